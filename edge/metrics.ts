// What this edge counts about its answers. Names are those of other inference servers under our prefix; times are in
// seconds, as Prometheus wants them.

import type { Done } from "../sidecar/protocol.ts";
import { Counter, Histogram, type Series } from "./prometheus.ts";

/** 1 ms to 500 s, in steps of 1, 2 and 5. */
const SECONDS = [0.001, 0.01, 0.1, 1, 10, 100].flatMap((unit) =>
  [1, 2, 5].map((factor) => Number((unit * factor).toPrecision(1))),
);

export type AnswerTimes = {
  model: string;
  /** From the request's arrival to its first delta; null: there was none. */
  firstMs: number | null;
  totalMs: number;
};

export class Metrics {
  readonly #httpRequests = new Counter(
    "kvasir_http_requests_total",
    "Requests by method, route and status; streams count when they begin; 499: the client left.",
  );
  readonly #answers = new Counter(
    "kvasir_request_success_total", "Answers that were completed, by the reason of their first choice's end.",
  );
  readonly #failures = new Counter(
    "kvasir_request_failure_total", "Answers that were begun and failed, by code; abort: their client left.",
  );
  readonly #promptTokens = new Counter("kvasir_prompt_tokens_total", "Tokens of prompts.");
  readonly #completionTokens = new Counter("kvasir_generation_tokens_total", "Tokens of answers.");
  readonly #cacheHits = new Counter("kvasir_prefix_cache_hits_total", "Prompt tokens served from cache, by tier.");
  readonly #cacheMisses = new Counter("kvasir_prefix_cache_misses_total", "Prompt tokens not served, by reason.");
  readonly #cacheChoices = new Counter("kvasir_cache_choices_total", "What was done about a prompt's cached part.");
  readonly #loadedBytes = new Counter("kvasir_cache_loaded_bytes_total", "Bytes of KV loaded for prompts.");
  readonly #droppedTokens = new Counter("kvasir_dropped_tokens_total", "Tokens that left a full context window.");
  readonly #firstToken = new Histogram(
    "kvasir_time_to_first_token_seconds", "From a request's arrival at the edge to its first text.", SECONDS,
  );
  readonly #perToken = new Histogram(
    "kvasir_time_per_output_token_seconds", "Mean time between the tokens of an answer, on the sidecar.", SECONDS,
  );
  readonly #total = new Histogram(
    "kvasir_e2e_request_latency_seconds", "From a request's arrival at the edge to its end, storage included.", SECONDS,
  );
  readonly #queue = new Histogram("kvasir_request_queue_time_seconds", "Time in the sidecar's queue.", SECONDS);
  readonly #load = new Histogram("kvasir_request_load_time_seconds", "Time taken by loads from host or disk.", SECONDS);

  /** In the order in which they are shown. */
  get series(): Series[] {
    return [
      this.#httpRequests, this.#answers, this.#failures, this.#promptTokens, this.#completionTokens,
      this.#cacheHits, this.#cacheMisses, this.#cacheChoices, this.#loadedBytes, this.#droppedTokens,
      this.#firstToken, this.#perToken, this.#total, this.#queue, this.#load,
    ];
  }

  /** `route`: its pattern, so that ids make no series. */
  countHttp(method: string, route: string, status: number): void {
    this.#httpRequests.add({ method, route, status: String(status) });
  }

  countAnswer({ usage, timings, cache, missReasons, finishReasons }: Done, times: AnswerTimes): void {
    const labels = { model: times.model };
    this.#answers.add({ ...labels, finished_reason: finishReasons[0] ?? "" });
    this.#promptTokens.add(labels, usage.promptTokens);
    this.#completionTokens.add(labels, usage.completionTokens);
    for (const [tier, tokens] of Object.entries(usage.cachedTokens)) this.#cacheHits.add({ ...labels, tier }, tokens);
    for (const [reason, tokens] of Object.entries(missReasons)) this.#cacheMisses.add({ ...labels, reason }, tokens);
    this.#cacheChoices.add({ ...labels, choice: cache.choice });
    this.#loadedBytes.add(labels, cache.loadedBytes);
    this.#droppedTokens.add(labels, cache.droppedTokens);
    if (times.firstMs !== null) this.#firstToken.observe(labels, times.firstMs / 1000);
    this.#total.observe(labels, times.totalMs / 1000);
    this.#queue.observe(labels, timings.queueMs / 1000);
    this.#load.observe(labels, timings.loadMs / 1000);
    const gaps = usage.completionTokens / finishReasons.length - 1;
    if (gaps > 0) this.#perToken.observe(labels, (timings.totalMs - timings.ttftMs) / 1000 / gaps);
  }

  countFailure(model: string, code: string): void {
    this.#failures.add({ model, code });
  }
}
