CREATE VIEW "public"."cache_misses_by_day" AS (
  SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    model,
    miss.key AS reason,
    sum(miss.value::bigint) AS tokens,
    count(*) AS requests
  FROM requests, jsonb_each_text(miss_reasons) AS miss
  GROUP BY 1, 2, 3);