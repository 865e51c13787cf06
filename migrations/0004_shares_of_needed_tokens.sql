DROP VIEW "public"."cache_hits_by_day";--> statement-breakpoint
DROP VIEW "public"."session_stats";--> statement-breakpoint
CREATE VIEW "public"."cache_hits_by_day" AS (
  SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    model,
    count(*) AS requests,
    sum(prompt_tokens) AS prompt_tokens,
    sum(missed)::bigint AS missed_tokens,
    sum(cached_gpu_tokens)::float8 / nullif(sum(cached + missed), 0) AS gpu_share,
    sum(cached_host_tokens)::float8 / nullif(sum(cached + missed), 0) AS host_share,
    sum(cached_disk_tokens)::float8 / nullif(sum(cached + missed), 0) AS disk_share,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY ttft_ms) AS ttft_ms_median
  FROM requests, LATERAL (
    SELECT
      cached_gpu_tokens + cached_host_tokens + cached_disk_tokens AS cached,
      (SELECT coalesce(sum(value::bigint), 0) FROM jsonb_each_text(miss_reasons)) AS missed
  ) AS counts
  GROUP BY 1, 2);--> statement-breakpoint
CREATE VIEW "public"."session_stats" AS (
  SELECT
    conversation_id,
    count(*) FILTER (WHERE finish_reason IN ('stop', 'length')) AS turns,
    sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens,
    sum(cached) AS cached_tokens,
    sum(missed)::bigint AS missed_tokens,
    sum(cached)::float8 / nullif(sum(cached + missed), 0) AS cached_share,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY ttft_ms) AS ttft_ms_median,
    max(created_at) AS last_request_at
  FROM requests, LATERAL (
    SELECT
      cached_gpu_tokens + cached_host_tokens + cached_disk_tokens AS cached,
      (SELECT coalesce(sum(value::bigint), 0) FROM jsonb_each_text(miss_reasons)) AS missed
  ) AS counts
  WHERE conversation_id IS NOT NULL
  GROUP BY conversation_id);