// An engine on a device, driven by a bench instead of a worker: requests of made-up tokens, and how long each took.

import { Engine } from "../../../sidecar/engine/engine.ts";
import { ModelRunner } from "../../../sidecar/engine/model-runner.ts";
import { openCache, type OpenedCache } from "../../../sidecar/engine/open-cache.ts";
import { type FinishEvent, nowMs } from "../../../sidecar/engine/request.ts";
import type { EngineCacheOptions, EngineWorkerOptions } from "../../../sidecar/engine/worker-messages.ts";
import { ABSENT, isHostReady } from "../../../sidecar/kvcache/cached-block.ts";
import { Batch } from "../../../sidecar/model/batch.ts";
import type { Model } from "../../../sidecar/model/model.ts";

const WAIT_US = 5000;
/** Between two pieces. */
const PINNING_MS_MAX = 30_000;
const GREEDY = {
  temperature: 0, topK: 0, topP: 1, minP: 0, seed: 1, frequencyPenalty: 0, presencePenalty: 0,
  repetitionPenalty: 1, logitBias: [], logprobs: null, ignoreEos: true,
};

export interface BenchEngineOptions {
  readonly libraryPath: string;
  readonly gpuBlocks: number;
  readonly hostBytes: number;
  readonly maxBatchTokens: number;
  readonly maxSequences: number;
  readonly cache?: Partial<EngineCacheOptions>;
}

export class BenchEngine {
  readonly engine: Engine;
  readonly #opened: OpenedCache;
  readonly #finished = new Map<number, FinishEvent>();
  #nextId = 1;

  constructor(
    readonly model: Model,
    options: BenchEngineOptions,
  ) {
    const cache: EngineCacheOptions = {
      hostBytes: options.hostBytes, hostName: "unused", keepHostCache: false, diskBytes: 0, diskPath: "/tmp/unused",
      diskAdmission: "eviction", diskIdleMs: 1000, ioThreads: 4, tiers: "inclusive", policy: "scheduler-aware",
      recompute: "never", preloadLayers: null, maxLoadStallMs: 1, loadAheadBlocks: null, keepBlocks: 1,
      truncationRatio: 0.5, ...options.cache,
    };
    const { libraryPath, maxBatchTokens, maxSequences, gpuBlocks } = options;
    const { blockTokens } = model.device.config;
    const workerOptions = { libraryPath, blockTokens, cache } as EngineWorkerOptions;
    this.#opened = openCache(model, gpuBlocks, workerOptions, () => {});
    const maxBlocksPerSequence = Math.ceil((model.maxModelLen + 1) / blockTokens);
    const limits = { maxRows: maxBatchTokens, maxSequences, maxBlocksPerSequence, maxBiases: 16 };
    const batches = [new Batch(model.device, limits), new Batch(model.device, limits)];
    this.engine = new Engine(this.#opened.cache, new ModelRunner(model, batches), {
      maxBatchTokens, maxSequences, maxBiases: 16, maxWaiting: 4096, eosTokens: new Set(),
      loadAheadBlocks: Math.floor(gpuBlocks / 4),
    });
  }

  get cache(): OpenedCache["cache"] {
    return this.#opened.cache;
  }

  submit(tokens: ArrayLike<number>, maxTokens: number, salt = new Uint8Array(32)): number {
    const id = this.#nextId++;
    this.engine.submit({
      id, tokens: Int32Array.from(tokens), salt, sampling: GREEDY, choiceCount: 1, maxTokens,
      isTruncating: true, rewrittenTokens: 0, keep: {}, isHeld: false, receivedAtMs: nowMs(),
      deadlineAtMs: nowMs() + 1e9,
    });
    return id;
  }

  /** One turn of the loop; what has finished is returned once. */
  turn(): readonly FinishEvent[] {
    const stepsBefore = this.engine.stats().steps;
    const finished: FinishEvent[] = [];
    for (const event of this.engine.step()) {
      if (event.type === "fail") throw new Error(event.message);
      if (event.type === "finish") finished.push(event);
    }
    const hasWork = !this.engine.isIdle || this.cache.moves.inFlight > 0;
    if (hasWork && this.engine.stats().steps === stepsBefore) this.model.device.wait(WAIT_US);
    return finished;
  }

  /** Turns until this request has ended. */
  answer(id: number): FinishEvent {
    for (;;) {
      for (const event of this.turn()) this.#finished.set(event.request, event);
      const finish = this.#finished.get(id);
      if (finish !== undefined) return finish;
    }
  }

  /** Turns until nothing moves. */
  settle(): void {
    while (!this.engine.isIdle || this.cache.moves.inFlight > 0) this.turn();
  }

  /** Until all host memory is page-locked, which goes on behind the first requests and disturbs their copies. */
  awaitHostMemory(): void {
    const { device } = this.model;
    const slots = this.#opened.tiers.hostSlots;
    let [pinned, sinceMs] = [-1, 0];
    while (pinned < slots) {
      const now = Number(device.info()["host_slots_pinned"] ?? slots);
      if (now !== pinned) [pinned, sinceMs] = [now, performance.now()];
      if (performance.now() - sinceMs > PINNING_MS_MAX) throw new Error("host memory is not being page-locked");
      if (pinned < slots) device.wait(WAIT_US);
    }
  }

  /** Takes everything off the gpu that is in host memory: as if others had needed the room. */
  evictToHost(): void {
    this.settle();
    const { residency } = this.cache;
    for (const block of residency.index.blocks()) {
      if (block.gpu !== ABSENT && isHostReady(block) && residency.gpu.refCount(block.gpu) === 0) {
        residency.leaveGpu(block, "evicted");
      }
    }
  }

  close(): void {
    this.settle();
    this.#opened.tiers.close(false);
  }
}

/** Made-up tokens that no other call gives. */
export function randomTokens(count: number, vocabSize: number): Int32Array {
  return Int32Array.from({ length: count }, () => 10 + Math.floor(Math.random() * (vocabSize - 10)));
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)]!;
}

export function percentile(values: readonly number[], share: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]!;
}
