// Turns through the whole engine: a turn whose history lies in host memory, saving on and off, and many conversations
// at once.

import type { Session } from "../../../sidecar/simulate/trace.ts";
import type { Model } from "../../../sidecar/model/model.ts";
import { BenchEngine, type BenchEngineOptions, median, percentile, randomTokens } from "./bench-engine.ts";

/** Where the history is when the new tokens come. */
export type Place = "recompute" | "gpu" | "host" | "host, no pre-loading" | "host, load or compute";

/** Enough for the histories of all repeats: page-locking more takes minutes. */
const TURN_HOST_BYTES_MAX = 16 * 2 ** 30;
/** Four prompts of 8K tokens of a 13B shape. */
const SAVING_HOST_BYTES_MAX = 28 * 2 ** 30;

export interface Turns {
  /** Median TTFT. */
  readonly ms: number;
  /** What the cache expects in the end, by which it chose when to begin: bytes from host memory per ms, ms of a step of
   * the new tokens; null: never measured. */
  readonly loadBytesPerMs: number | null;
  readonly stepMs: number | null;
}

/** Turns of `fresh` tokens behind `history`. */
export function measureTurns(
  model: Model,
  options: BenchEngineOptions,
  { history, fresh, place, repeats }: { history: number; fresh: number; place: Place; repeats: number },
): Turns {
  const { vocabSize, layers } = model.config;
  const preloadLayers = place === "host, no pre-loading" ? layers : null;
  const recompute = place === "host, load or compute" ? "auto" : "never";
  const hostBytes = Math.min(options.hostBytes, TURN_HOST_BYTES_MAX);
  const cache = { ...options.cache, preloadLayers, recompute } as const;
  const bench = new BenchEngine(model, { ...options, hostBytes, cache });
  bench.awaitHostMemory();
  const times: number[] = [];
  for (let i = 0; i <= repeats; i++) {
    const old = randomTokens(history, vocabSize);
    const tokens = [...old, ...randomTokens(fresh, vocabSize)];
    if (place !== "recompute") bench.answer(bench.submit(old, 1));
    bench.settle();
    if (place.startsWith("host")) bench.evictToHost();
    const { timings } = bench.answer(bench.submit(tokens, 1));
    if (i > 0) times.push(timings.ttftMs);
  }
  const { loadRate, stepTimes } = bench.cache.costs;
  bench.close();
  return { ms: median(times), loadBytesPerMs: loadRate.perMs, stepMs: stepTimes.expectedMs(fresh) };
}

/** Ms of a prompt and an answer, with write-through to host memory and without. */
export function savingMs(
  model: Model,
  options: BenchEngineOptions,
  { prompt, answer, repeats }: { prompt: number; answer: number; repeats: number },
): { on: number; off: number } {
  const run = (hostBytes: number): number => {
    const bench = new BenchEngine(model, { ...options, hostBytes });
    bench.awaitHostMemory();
    const times: number[] = [];
    for (let i = 0; i <= repeats; i++) {
      const { timings } = bench.answer(bench.submit(randomTokens(prompt, model.config.vocabSize), answer));
      if (i > 0) times.push(timings.totalMs);
    }
    bench.close();
    return median(times);
  };
  const hostBytes = Math.min(options.hostBytes, SAVING_HOST_BYTES_MAX);
  const first = { on: run(hostBytes), off: run(0) };
  const second = { off: run(0), on: run(hostBytes) };
  return { on: Math.min(first.on, second.on), off: Math.min(first.off, second.off) };
}

export interface Workload {
  readonly tokensPerS: number;
  readonly ttftP50Ms: number;
  readonly ttftP99Ms: number;
  /** Of prompt tokens. */
  readonly cachedShare: number;
}

/** Conversations that each send their next turn as soon as they have their answer. */
export function conversations(
  model: Model,
  options: BenchEngineOptions,
  sessions: readonly Session[],
  isCached: boolean,
): Workload {
  const bench = new BenchEngine(model, options);
  bench.awaitHostMemory();
  const { vocabSize } = model.config;
  const talks = sessions.map((turns, i) => ({ turns, next: 0, tokens: [] as number[], salt: saltOf(i) }));
  const byRequest = new Map<number, (typeof talks)[number]>();
  const ttfts: number[] = [];
  let [completion, prompt, cached] = [0, 0, 0];
  const send = (talk: (typeof talks)[number]): void => {
    const { newTokens, outputTokens } = talk.turns[talk.next++]!;
    talk.tokens.push(...randomTokens(newTokens, vocabSize));
    // Without a cache nothing may be found: another account each time.
    const salt = isCached ? talk.salt : crypto.getRandomValues(new Uint8Array(32));
    byRequest.set(bench.submit(talk.tokens, outputTokens, salt), talk);
  };
  const beginMs = performance.now();
  for (const talk of talks) send(talk);
  while (byRequest.size > 0) {
    for (const finish of bench.turn()) {
      const talk = byRequest.get(finish.request)!;
      byRequest.delete(finish.request);
      talk.tokens = [...finish.tokens];
      ttfts.push(finish.timings.ttftMs);
      const { promptTokens, completionTokens, cachedTokens } = finish.usage;
      completion += completionTokens;
      prompt += promptTokens;
      cached += cachedTokens.gpu + cachedTokens.host + cachedTokens.disk;
      if (talk.next < talk.turns.length) send(talk);
    }
  }
  const seconds = (performance.now() - beginMs) / 1000;
  bench.close();
  return {
    tokensPerS: completion / seconds,
    ttftP50Ms: percentile(ttfts, 0.5),
    ttftP99Ms: percentile(ttfts, 0.99),
    cachedShare: cached / prompt,
  };
}

function saltOf(index: number): Uint8Array<ArrayBuffer> {
  const salt = new Uint8Array(32);
  new DataView(salt.buffer).setUint32(0, index + 1);
  return salt;
}
