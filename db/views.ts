// Views for people in psql: how well the cache works, per day and per conversation, and how long answers take.
// They only read; nothing in Kvasir depends on them.
//
// Shares are of the prompt tokens that were served or had to be computed. Those that had left the view before were
// neither; dropped_tokens does not tell them from those that left it during the request.

import { sql } from "drizzle-orm";
import { bigint, date, doublePrecision, jsonb, pgView, text, timestamp, uuid } from "drizzle-orm/pg-core";

/** Of a request's prompt: the tokens that were served from cache, and those that had to be computed. */
const counts = sql`LATERAL (
    SELECT
      cached_gpu_tokens + cached_host_tokens + cached_disk_tokens AS cached,
      (SELECT coalesce(sum(value::bigint), 0) FROM jsonb_each_text(miss_reasons)) AS missed
  ) AS counts`;

/** Per conversation: its turns, tokens, and the share of needed prompt tokens that came from cache. */
export const sessionStats = pgView("session_stats", {
  conversationId: uuid("conversation_id").notNull(),
  turns: bigint("turns", { mode: "number" }).notNull(),
  promptTokens: bigint("prompt_tokens", { mode: "number" }),
  completionTokens: bigint("completion_tokens", { mode: "number" }),
  cachedTokens: bigint("cached_tokens", { mode: "number" }),
  missedTokens: bigint("missed_tokens", { mode: "number" }),
  cachedShare: doublePrecision("cached_share"),
  ttftMsMedian: doublePrecision("ttft_ms_median"),
  lastRequestAt: timestamp("last_request_at", { withTimezone: true }),
}).as(sql`
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
  FROM requests, ${counts}
  WHERE conversation_id IS NOT NULL
  GROUP BY conversation_id`);

/** Per day and model: requests, prompt tokens, and what share of the needed ones each tier served. */
export const cacheHitsByDay = pgView("cache_hits_by_day", {
  day: date("day").notNull(),
  model: text("model").notNull(),
  requests: bigint("requests", { mode: "number" }).notNull(),
  promptTokens: bigint("prompt_tokens", { mode: "number" }),
  missedTokens: bigint("missed_tokens", { mode: "number" }),
  gpuShare: doublePrecision("gpu_share"),
  hostShare: doublePrecision("host_share"),
  diskShare: doublePrecision("disk_share"),
  ttftMsMedian: doublePrecision("ttft_ms_median"),
}).as(sql`
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
  FROM requests, ${counts}
  GROUP BY 1, 2`);

/** Per day, model and reason: prompt tokens that no tier served. */
export const cacheMissesByDay = pgView("cache_misses_by_day", {
  day: date("day").notNull(),
  model: text("model").notNull(),
  reason: text("reason").notNull(),
  tokens: bigint("tokens", { mode: "number" }).notNull(),
  requests: bigint("requests", { mode: "number" }).notNull(),
}).as(sql`
  SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    model,
    miss.key AS reason,
    sum(miss.value::bigint) AS tokens,
    count(*) AS requests
  FROM requests, jsonb_each_text(miss_reasons) AS miss
  GROUP BY 1, 2, 3`);

/** Per day and model: how long answers took. Rates count from the first token on. */
export const latencyByDay = pgView("latency_by_day", {
  day: date("day").notNull(),
  model: text("model").notNull(),
  requests: bigint("requests", { mode: "number" }).notNull(),
  failed: bigint("failed", { mode: "number" }).notNull(),
  ttftMsP50: doublePrecision("ttft_ms_p50"),
  ttftMsP90: doublePrecision("ttft_ms_p90"),
  ttftMsP99: doublePrecision("ttft_ms_p99"),
  queueMsP50: doublePrecision("queue_ms_p50"),
  queueMsP99: doublePrecision("queue_ms_p99"),
  totalMsP50: doublePrecision("total_ms_p50"),
  totalMsP99: doublePrecision("total_ms_p99"),
  tokensPerSecondP50: doublePrecision("tokens_per_second_p50"),
}).as(sql`
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
  GROUP BY 1, 2`);

/**
 * Per request that had something to load: what was chosen, what had been expected, what it took. The regret is how
 * much longer a load took than computing the same tokens was expected to take.
 */
export const cacheChoices = pgView("cache_choices", {
  requestId: uuid("request_id").notNull(),
  conversationId: uuid("conversation_id"),
  createdAt: timestamp("created_at", { withTimezone: true }).notNull(),
  model: text("model").notNull(),
  sidecar: text("sidecar"),
  choice: text("choice").notNull(),
  loadedBytes: bigint("loaded_bytes", { mode: "number" }),
  predictedLoadMs: doublePrecision("predicted_load_ms"),
  predictedRecomputeMs: doublePrecision("predicted_recompute_ms"),
  loadMs: doublePrecision("load_ms"),
  loadErrorMs: doublePrecision("load_error_ms"),
  regretMs: doublePrecision("regret_ms"),
}).as(sql`
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
  WHERE predicted_load_ms IS NOT NULL`);

/** Per day, model and choice: how good the predictions were, and what the wrong ones cost. */
export const cacheChoicesByDay = pgView("cache_choices_by_day", {
  day: date("day").notNull(),
  model: text("model").notNull(),
  choice: text("choice").notNull(),
  requests: bigint("requests", { mode: "number" }).notNull(),
  loadedBytes: bigint("loaded_bytes", { mode: "number" }),
  predictedLoadMsMedian: doublePrecision("predicted_load_ms_median"),
  loadMsMedian: doublePrecision("load_ms_median"),
  predictedRecomputeMsMedian: doublePrecision("predicted_recompute_ms_median"),
  loadErrorMsP90: doublePrecision("load_error_ms_p90"),
  regretted: bigint("regretted", { mode: "number" }).notNull(),
  regretMsSum: doublePrecision("regret_ms_sum"),
}).as(sql`
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
  GROUP BY 1, 2, 3`);

/** The newest sample of each sidecar. */
export const sidecarStatsLatest = pgView("sidecar_stats_latest", {
  sidecar: text("sidecar").notNull(),
  takenAt: timestamp("taken_at", { withTimezone: true }).notNull(),
  stats: jsonb("stats").$type<Record<string, unknown>>().notNull(),
}).as(sql`
  SELECT DISTINCT ON (sidecar) sidecar, taken_at, stats
  FROM sidecar_stats
  ORDER BY sidecar, taken_at DESC`);
