// The engine's thread: loads the model, then turns the loop. It waits for the device inside a native call, never on the
// thread that serves sockets; messages are applied between steps.

import { NativeError, Status } from "../native.ts";
import { cacheStats } from "../kvcache/cache-stats.ts";
import { TierError } from "../kvcache/open-tiers.ts";
import { Batch } from "../model/batch.ts";
import { loadModel, type Model } from "../model/model.ts";
import { ModelError } from "../model/model-error.ts";
import { CacheOptionError, openCache, type OpenedCache } from "./open-cache.ts";
import { Engine } from "./engine.ts";
import { ModelRunner } from "./model-runner.ts";
import { describeMemory, poolBlocks, PoolSizeError } from "./pool-size.ts";
import { describeBreakEven, probe } from "./probe.ts";
import { type EngineEvent, nowMs } from "./request.ts";
import { warmUp } from "./warm-up.ts";
import type { EngineWorkerOptions, FromEngine, ToEngine } from "./worker-messages.ts";

declare const self: Worker;

/** Steps that may be in flight: one running, one behind it. */
const STEPS_AHEAD = 2;
/** Logit biases of all rows of a step: a few requests at the limit of 1024 each. */
const BIASES_MAX = 4096;
/** A wait ends this often to look at deadlines. */
const WAIT_US = 20_000;
/** So often an idle engine looks whether blocks have expired or become idle. */
const IDLE_TURN_MS = 250;

const inbox: ToEngine[] = [];
/** Answers that wait until the disk has forgotten, too, each with what had been deleted by then. */
const forgotten: { readonly message: FromEngine; readonly deletions: number }[] = [];
let wakeInbox: (() => void) | null = null;

self.onmessage = (message: MessageEvent<EngineWorkerOptions>) => {
  self.onmessage = (next: MessageEvent<ToEngine>) => {
    inbox.push(next.data);
    wakeInbox?.();
  };
  main(message.data).catch((error: unknown) => {
    const isUnsupported = error instanceof NativeError && error.status === Status.unsupported;
    post({ type: "failed", message: describe(error), isUnsupported });
  });
};

async function main(options: EngineWorkerOptions): Promise<void> {
  const startedAtMs = performance.now();
  const model = await loadModel({
    libraryPath: options.libraryPath,
    directory: options.modelDirectory,
    randomWeights: options.randomWeights,
    maxModelLen: options.maxModelLen,
    maxRows: options.maxBatchTokens,
    maxSequences: options.maxNumSeqs,
    blockTokens: options.blockTokens,
    kvDtype: options.kvDtype,
    computeDtype: options.computeDtype,
    quantization: options.quantization,
    threads: options.threads,
    gpuIndex: options.gpuIndex,
    onProgress: (progress) => post({ type: "progress", message: progress }),
  });
  const cache = createCache(model, options);
  const engine = createEngine(model, cache, options, startedAtMs);
  const deadlineMs = await loop(engine, model);
  postEvents(engine.takeEvents());
  await flush(engine, model, performance.now() + deadlineMs);
  if (options.cache.keepHostCache) cache.cache.sealHost();
  cache.tiers.close(options.cache.keepHostCache);
  model.device.close();
  post({ type: "stopped" });
}

function createCache(model: Model, options: EngineWorkerOptions): OpenedCache {
  const { device } = model;
  const { blockBytes, slotBytes } = device.blockBytes();
  const memory = device.memoryInfo();
  const gpuBlocks = poolBlocks({
    wantedBlocks: options.gpuBlocks,
    wantedBytes: options.gpuMemoryBytes,
    utilization: options.gpuMemoryUtilization,
    isGpu: isGpu(model),
    ...memory,
    blockBytes,
    blockTokens: options.blockTokens,
    maxModelLen: model.maxModelLen,
  });
  if (isGpu(model)) {
    const plan = { ...memory, weightBytes: model.weightBytes, kvBytes: gpuBlocks * slotBytes };
    post({ type: "progress", message: describeMemory(plan) });
  }
  device.createKv(gpuBlocks);
  return openCache(model, gpuBlocks, options, (message) => post({ type: "progress", message }));
}

function createEngine(
  model: Model,
  { cache, tiers }: OpenedCache,
  options: EngineWorkerOptions,
  startedAtMs: number,
): Engine {
  const { device } = model;
  const maxModelLen = cache.rule.windowTokens;
  const limits = {
    maxRows: options.maxBatchTokens,
    maxSequences: options.maxNumSeqs,
    maxBlocksPerSequence: Math.ceil((maxModelLen + 1) / options.blockTokens),
    maxBiases: BIASES_MAX,
  };
  const batches = Array.from({ length: STEPS_AHEAD }, () => new Batch(device, limits));
  const runner = new ModelRunner(model, batches);
  if (isGpu(model)) warmUpGpu(runner, cache.blockCount);
  probe(model, runner, cache);
  post({ type: "progress", message: describeBreakEven(cache) });
  const engine = new Engine(cache, runner, {
    maxBatchTokens: options.maxBatchTokens,
    maxSequences: options.maxNumSeqs,
    maxBiases: BIASES_MAX,
    maxWaiting: options.maxWaiting,
    loadAheadBlocks: options.cache.loadAheadBlocks ?? Math.floor(cache.blockCount / 4),
    eosTokens: model.eosTokens,
  });
  post({
    type: "ready",
    deviceHandle: device.handle,
    device: device.info(),
    fingerprint: model.fingerprint,
    maxModelLen,
    vocabSize: model.config.vocabSize,
    kvDtype: device.config.kvDtype,
    gpuBlocks: cache.blockCount,
    hostSlots: tiers.hostSlots,
    diskSlots: tiers.diskSlots,
    isExclusive: cache.options.isExclusive,
    blockBytes: cache.options.blockBytes,
    loadMs: performance.now() - startedAtMs,
  });
  return engine;
}

function isGpu({ device }: Model): boolean {
  return device.info()["backend"] === "cuda";
}

function warmUpGpu(runner: ModelRunner, blockCount: number): void {
  const beginMs = performance.now();
  post({ type: "progress", message: "warming up: products are timed and decode graphs captured" });
  warmUp(runner, blockCount);
  post({ type: "progress", message: `warmed up in ${((performance.now() - beginMs) / 1000).toFixed(1)} s` });
}

/** Turns until a stop message comes; returns its deadline. */
async function loop(engine: Engine, model: Model): Promise<number> {
  for (;;) {
    const deadlineMs = applyInbox(engine);
    if (deadlineMs !== null) return deadlineMs;
    const stepsBefore = engine.stats().steps;
    postEvents(engine.step());
    answerForgets(engine);
    if (engine.isIdle) await idle(engine, model);
    // With nothing new enqueued there is nothing to do until the device has finished something.
    else if (engine.stats().steps === stepsBefore) model.device.wait(WAIT_US);
    // A worker inside a loop receives its messages only when it lets the event loop turn.
    await turnEventLoop();
  }
}

/** No request: waits for one, and for what the cache moves meanwhile. */
async function idle(engine: Engine, model: Model): Promise<void> {
  if (engine.cache.moves.inFlight > 0) model.device.wait(WAIT_US);
  else await nextMessage(engine.hasBackgroundWork ? IDLE_TURN_MS : null);
}

/** Has the disk take what it admits, so that the next start finds it. */
async function flush(engine: Engine, model: Model, deadlineAtMs: number): Promise<void> {
  const { cache } = engine;
  while (cache.flush(nowMs()) && performance.now() < deadlineAtMs) {
    model.device.wait(WAIT_US);
    await turnEventLoop();
  }
}

/** Returns the deadline of a stop message, if one came. */
function applyInbox(engine: Engine): number | null {
  for (const message of inbox.splice(0)) {
    switch (message.type) {
      case "submit":
        engine.submit(message.request);
        break;
      case "abort":
        engine.abort(message.request, message.choice, message.reason);
        break;
      case "stats":
        post({
          type: "stats",
          nonce: message.nonce,
          stats: { ...engine.stats(), ...cacheStats(engine.cache) },
        });
        break;
      case "forget": {
        const blocks = engine.forget(message.blockIds);
        const answer = { type: "forgotten", nonce: message.nonce, blocks } as const;
        forgotten.push({ message: answer, deletions: engine.cache.deletions });
        break;
      }
      case "stop":
        return message.deadlineMs;
    }
  }
  return null;
}

/** What was deleted is gone for good when nothing of it is left on disk. */
function answerForgets(engine: Engine): void {
  while (forgotten.length > 0 && engine.cache.isErased(forgotten[0]!.deletions)) post(forgotten.shift()!.message);
}

/** Resolves when a message has come, or after so many ms. */
async function nextMessage(timeoutMs: number | null): Promise<void> {
  if (inbox.length > 0) return;
  let timer: ReturnType<typeof setTimeout> | undefined;
  await new Promise<void>((resolve) => {
    wakeInbox = resolve;
    if (timeoutMs !== null) timer = setTimeout(resolve, timeoutMs);
  });
  clearTimeout(timer);
  wakeInbox = null;
}

function turnEventLoop(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

function postEvents(events: readonly EngineEvent[]): void {
  if (events.length > 0) post({ type: "events", events });
}

function post(message: FromEngine): void {
  self.postMessage(message);
}

function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  // Of ours the message says it all; of others the name helps.
  const isOurs = error instanceof NativeError || error instanceof ModelError || error instanceof PoolSizeError ||
    error instanceof TierError || error instanceof CacheOptionError;
  return isOurs ? error.message : `${error.name}: ${error.message}`;
}
