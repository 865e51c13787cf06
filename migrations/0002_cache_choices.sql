CREATE TABLE "sidecar_stats" (
	"sidecar" text NOT NULL,
	"taken_at" timestamp with time zone NOT NULL,
	"stats" jsonb NOT NULL,
	CONSTRAINT "sidecar_stats_sidecar_taken_at_pk" PRIMARY KEY("sidecar","taken_at")
);
--> statement-breakpoint
ALTER TABLE "requests" ADD COLUMN "cache_choice" text;--> statement-breakpoint
ALTER TABLE "requests" ADD COLUMN "predicted_load_ms" double precision;--> statement-breakpoint
ALTER TABLE "requests" ADD COLUMN "predicted_recompute_ms" double precision;--> statement-breakpoint
ALTER TABLE "requests" ADD COLUMN "loaded_bytes" bigint;--> statement-breakpoint
ALTER TABLE "requests" ADD COLUMN "dropped_tokens" integer;--> statement-breakpoint
ALTER TABLE "requests" ADD COLUMN "cache_ttl_s" integer;--> statement-breakpoint
ALTER TABLE "requests" ADD COLUMN "cache_priority" integer;--> statement-breakpoint
CREATE INDEX "sidecar_stats_taken_at_idx" ON "sidecar_stats" USING btree ("taken_at");--> statement-breakpoint
CREATE VIEW "public"."cache_choices" AS (
  SELECT
    id AS request_id,
    conversation_id,
    created_at,
    model,
    sidecar,
    cache_choice AS choice,
    loaded_bytes,
    predicted_load_ms,
    predicted_recompute_ms,
    load_ms,
    CASE WHEN cache_choice IN ('load', 'split') THEN load_ms - predicted_load_ms END AS load_error_ms,
    CASE WHEN cache_choice IN ('load', 'split') THEN greatest(load_ms - predicted_recompute_ms, 0) END AS regret_ms
  FROM requests
  WHERE predicted_load_ms IS NOT NULL);--> statement-breakpoint
CREATE VIEW "public"."cache_choices_by_day" AS (
  SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    model,
    choice,
    count(*) AS requests,
    sum(loaded_bytes)::bigint AS loaded_bytes,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY predicted_load_ms) AS predicted_load_ms_median,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY load_ms) AS load_ms_median,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY predicted_recompute_ms) AS predicted_recompute_ms_median,
    percentile_cont(0.9) WITHIN GROUP (ORDER BY abs(load_error_ms)) AS load_error_ms_p90,
    count(*) FILTER (WHERE regret_ms > 0) AS regretted,
    sum(regret_ms) AS regret_ms_sum
  FROM cache_choices
  GROUP BY 1, 2, 3);--> statement-breakpoint
CREATE VIEW "public"."latency_by_day" AS (
  SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    model,
    count(*) AS requests,
    count(error) AS failed,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY ttft_ms) AS ttft_ms_p50,
    percentile_cont(0.9) WITHIN GROUP (ORDER BY ttft_ms) AS ttft_ms_p90,
    percentile_cont(0.99) WITHIN GROUP (ORDER BY ttft_ms) AS ttft_ms_p99,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY queue_ms) AS queue_ms_p50,
    percentile_cont(0.99) WITHIN GROUP (ORDER BY queue_ms) AS queue_ms_p99,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY total_ms) AS total_ms_p50,
    percentile_cont(0.99) WITHIN GROUP (ORDER BY total_ms) AS total_ms_p99,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY
      1000 * (completion_tokens - choice_count) / nullif(total_ms - ttft_ms, 0)) AS tokens_per_second_p50
  FROM requests
  GROUP BY 1, 2);--> statement-breakpoint
CREATE VIEW "public"."sidecar_stats_latest" AS (
  SELECT DISTINCT ON (sidecar) sidecar, taken_at, stats
  FROM sidecar_stats
  ORDER BY sidecar, taken_at DESC);