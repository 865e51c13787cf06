// The engine's thread: loads the model, then turns the loop. It waits for the device inside a native call, never on the
// thread that serves sockets; messages are applied between steps.

import { NativeError } from "../native.ts";
import { KvCache } from "../kvcache/kv-cache.ts";
import { Batch } from "../model/batch.ts";
import { loadModel, type Model } from "../model/model.ts";
import { Engine } from "./engine.ts";
import { ModelRunner } from "./model-runner.ts";
import { poolBlocks } from "./pool-size.ts";
import type { EngineWorkerOptions, FromEngine, ToEngine } from "./worker-messages.ts";

declare const self: Worker;

/** Steps that may be in flight: one running, one behind it. */
const STEPS_AHEAD = 2;
/** Logit biases of all rows of a step: a few requests at the limit of 1024 each. */
const BIASES_MAX = 4096;
/** A wait ends this often to look at deadlines. */
const WAIT_US = 20_000;

const inbox: ToEngine[] = [];
let wakeInbox: (() => void) | null = null;

self.onmessage = (message: MessageEvent<EngineWorkerOptions>) => {
  self.onmessage = (next: MessageEvent<ToEngine>) => {
    inbox.push(next.data);
    wakeInbox?.();
  };
  main(message.data).catch((error: unknown) => {
    post({ type: "failed", message: describe(error) });
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
    threads: options.threads,
    gpuIndex: options.gpuIndex,
    onProgress: (progress) => post({ type: "progress", message: progress }),
  });
  const engine = createEngine(model, options, startedAtMs);
  await loop(engine, model);
  model.device.close();
  post({ type: "stopped" });
}

function createEngine(model: Model, options: EngineWorkerOptions, startedAtMs: number): Engine {
  const { device, maxModelLen } = model;
  const { blockBytes } = device.blockBytes();
  const info = device.info();
  const gpuBlocks = poolBlocks({
    wantedBlocks: options.gpuBlocks,
    wantedBytes: options.gpuMemoryBytes,
    utilization: options.gpuMemoryUtilization,
    isGpu: info["backend"] === "cuda",
    ...device.memoryInfo(),
    blockBytes,
    blockTokens: options.blockTokens,
    maxModelLen,
  });
  device.createKv(gpuBlocks);
  const limits = {
    maxRows: options.maxBatchTokens,
    maxSequences: options.maxNumSeqs,
    maxBlocksPerSequence: Math.ceil((maxModelLen + 1) / options.blockTokens),
    maxBiases: BIASES_MAX,
  };
  const batches = Array.from({ length: STEPS_AHEAD }, () => new Batch(device, limits));
  const cache = new KvCache(device, {
    blockTokens: options.blockTokens,
    gpuBlocks,
    fingerprint: model.fingerprint,
  });
  const engine = new Engine(cache, new ModelRunner(model, batches), {
    maxBatchTokens: options.maxBatchTokens,
    maxSequences: options.maxNumSeqs,
    maxBiases: BIASES_MAX,
    maxWaiting: options.maxWaiting,
    eosTokens: model.eosTokens,
  });
  post({
    type: "ready",
    deviceHandle: device.handle,
    device: info,
    fingerprint: model.fingerprint,
    maxModelLen,
    vocabSize: model.config.vocabSize,
    kvDtype: device.config.kvDtype,
    gpuBlocks,
    blockBytes,
    loadMs: performance.now() - startedAtMs,
  });
  return engine;
}

/** Turns until a stop message comes. */
async function loop(engine: Engine, model: Model): Promise<void> {
  for (;;) {
    if (applyInbox(engine)) return;
    const stepsBefore = engine.stats().steps;
    const events = engine.step();
    if (events.length > 0) post({ type: "events", events });
    if (engine.isIdle) await nextMessage();
    // With nothing new enqueued there is nothing to do until the device has finished a step.
    else if (engine.stats().steps === stepsBefore) model.device.wait(WAIT_US);
    // A worker inside a loop receives its messages only when it lets the event loop turn.
    await turnEventLoop();
  }
}

/** True: stop. */
function applyInbox(engine: Engine): boolean {
  for (const message of inbox.splice(0)) {
    switch (message.type) {
      case "submit":
        engine.submit(message.request);
        break;
      case "abort":
        engine.abort(message.request, message.choice, message.reason);
        break;
      case "stats":
        post({ type: "stats", nonce: message.nonce, stats: { ...engine.stats(), ...engine.cache.stats() } });
        break;
      case "stop":
        return true;
    }
  }
  return false;
}

async function nextMessage(): Promise<void> {
  if (inbox.length > 0) return;
  await new Promise<void>((resolve) => {
    wakeInbox = resolve;
  });
  wakeInbox = null;
}

function turnEventLoop(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

function post(message: FromEngine): void {
  self.postMessage(message);
}

function describe(error: unknown): string {
  if (error instanceof NativeError) return error.message;
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}
