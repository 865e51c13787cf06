// The engine as its worker runs it, in the process of whoever turns it: a real model on the CPU library, its tiers in
// shared memory and in a file. Tests turn it by a clock of their own and get, with every token, a hash of all the
// logits that it was chosen from.

import { join } from "node:path";
import { Engine } from "../../sidecar/engine/engine.ts";
import { ModelRunner } from "../../sidecar/engine/model-runner.ts";
import { type OpenedCache, openCache } from "../../sidecar/engine/open-cache.ts";
import { type EngineRequest, type EngineSampling, type FinishEvent, nowMs } from "../../sidecar/engine/request.ts";
import type { EngineCacheOptions, EngineWorkerOptions } from "../../sidecar/engine/worker-messages.ts";
import { HEADER_BYTES } from "../../sidecar/kvcache/block-header.ts";
import { diskFileBytes } from "../../sidecar/kvcache/disk-layout.ts";
import { Batch, type BatchLimits, type SampledToken } from "../../sidecar/model/batch.ts";
import type { ForwardHooks } from "../../sidecar/model/decoder.ts";
import { loadModel, type Model } from "../../sidecar/model/model.ts";
import type { WeightDtype } from "../../sidecar/model/model-config.ts";
import type { HostBuffer } from "../../sidecar/native.ts";
import { cpuLibraryPath } from "./cpu-library.ts";

export interface ModelEngineOptions {
  /** Hugging Face directory. */
  readonly model: string;
  /** Folder of the disk tier's file; names the shared memory, too. */
  readonly data: string;
  readonly randomWeights?: boolean;
  readonly blockTokens?: number;
  readonly maxModelLen?: number;
  readonly gpuBlocks?: number;
  readonly hostBlocks?: number;
  readonly diskBlocks?: number;
  readonly maxBatchTokens?: number;
  readonly maxSequences?: number;
  readonly kvDtype?: WeightDtype;
  readonly threads?: number;
  readonly cache?: Partial<EngineCacheOptions>;
  /** "turns": a millisecond a turn, and logits are hashed; "real": as the worker does, for measuring. */
  readonly clock?: "turns" | "real";
}

/** What became of a request. */
export interface Answer {
  readonly tokens: number[];
  /** Of each token, a hash of the logits that it was chosen from. */
  readonly logits: bigint[];
  finish: FinishEvent | null;
}

/** Chosen by chance, from the token's place alone, so that answers differ and can be had again. */
export const SAMPLING: EngineSampling = {
  temperature: 1, topK: 0, topP: 1, minP: 0, seed: 11, frequencyPenalty: 0, presencePenalty: 0, repetitionPenalty: 1,
  logitBias: [], logprobs: null, ignoreEos: true,
};

const WAIT_US = 20_000;
const MAX_TURNS = 1_000_000;
const BIASES_MAX = 16;

export class ModelEngine {
  readonly answers = new Map<number, Answer>();
  readonly opened: OpenedCache;
  readonly engine: Engine;
  #clockMs = Date.now();
  #nextId = 1;
  /** Called before each turn. */
  onTurn: () => void = () => {};

  private constructor(
    readonly model: Model,
    readonly options: ModelEngineOptions,
    /** What the tiers had to say. */
    readonly messages: string[],
  ) {
    const { device } = model;
    const { maxBatchTokens = 64, maxSequences = 4, clock = "turns" } = options;
    const { blockTokens } = device.config;
    const gpuBlocks = options.gpuBlocks ?? 256;
    device.createKv(gpuBlocks);
    this.opened = openCache(model, gpuBlocks, workerOptions(model, options), (message) => messages.push(message));
    const maxModelLen = this.cache.rule.windowTokens;
    const limits = {
      maxRows: maxBatchTokens, maxSequences, maxBiases: BIASES_MAX,
      maxBlocksPerSequence: Math.ceil((maxModelLen + 1) / blockTokens),
    };
    const isRecording = clock === "turns";
    const makeBatch = () => (isRecording ? new RecordingBatch(model, limits) : new Batch(device, limits));
    const runner = new (isRecording ? RecordingRunner : ModelRunner)(model, [makeBatch(), makeBatch()]);
    const engineOptions = {
      maxBatchTokens, maxSequences, maxBiases: BIASES_MAX, maxWaiting: 1000,
      loadAheadBlocks: options.cache?.loadAheadBlocks ?? Math.floor(gpuBlocks / 4), eosTokens: model.eosTokens,
    };
    this.engine = new Engine(this.cache, runner, engineOptions, () => this.nowMs);
  }

  static async open(options: ModelEngineOptions): Promise<ModelEngine> {
    const messages: string[] = [];
    const model = await loadModel({
      libraryPath: cpuLibraryPath,
      directory: options.model,
      randomWeights: options.randomWeights ?? false,
      maxModelLen: options.maxModelLen ?? 256,
      maxRows: options.maxBatchTokens ?? 64,
      maxSequences: options.maxSequences ?? 4,
      blockTokens: options.blockTokens ?? 8,
      kvDtype: options.kvDtype ?? "auto",
      computeDtype: "auto",
      quantization: "none",
      threads: options.threads ?? 1,
      gpuIndex: 0,
      onProgress: () => {},
    });
    try {
      return new ModelEngine(model, options, messages);
    } catch (error) {
      model.device.close();
      throw error;
    }
  }

  get cache() {
    return this.opened.cache;
  }

  get nowMs(): number {
    return this.options.clock === "real" ? nowMs() : this.#clockMs;
  }

  /** Returns the request's id. */
  submit(tokens: ArrayLike<number>, changes: Partial<EngineRequest> = {}): number {
    const id = this.#nextId++;
    this.engine.submit({
      id, tokens: Int32Array.from(tokens), salt: new Uint8Array(32), sampling: SAMPLING, choiceCount: 1, maxTokens: 16,
      isTruncating: true, rewrittenTokens: 0, keep: {}, isHeld: false, receivedAtMs: this.nowMs,
      deadlineAtMs: Infinity, ...changes,
    });
    return id;
  }

  /** One turn of the worker's loop. */
  turn(): void {
    this.onTurn();
    this.#clockMs++;
    const { steps } = this.engine.stats();
    for (const event of this.engine.step()) this.#note(event);
    const isMoving = this.engine.hasStepInFlight || this.cache.moves.inFlight > 0;
    if (isMoving && this.engine.stats().steps === steps) this.model.device.wait(WAIT_US);
  }

  runToEnd(): void {
    this.#turnWhile(() => !this.engine.isIdle);
  }

  /** Submits, runs to the end and returns the answer of the only choice. */
  ask(tokens: ArrayLike<number>, changes: Partial<EngineRequest> = {}): Answer & { readonly finish: FinishEvent } {
    const id = this.submit(tokens, changes);
    this.runToEnd();
    return this.answer(id);
  }

  /** A conversation of which each turn adds these tokens; returns all of its tokens. */
  converse(news: readonly (readonly number[])[], maxTokens: number): number[] {
    const tokens: number[] = [];
    for (const added of news) {
      tokens.push(...added);
      tokens.push(...this.ask(tokens, { maxTokens }).tokens);
    }
    return tokens;
  }

  answer(request: number, choice = 0): Answer & { readonly finish: FinishEvent } {
    const answer = this.answers.get(request * 16 + choice);
    if (answer?.finish == null) throw new Error(`request ${request} has no answer`);
    return answer as Answer & { readonly finish: FinishEvent };
  }

  /** Nothing is asked for so long that all that becomes idle is written; ends when nothing moves any more. */
  quiet(): void {
    this.runToEnd();
    this.#clockMs += 60_000;
    this.#turnWhile(() => this.cache.isBusy(this.nowMs));
  }

  /** Ends as an orderly stop does. */
  close(keepHost = false): void {
    this.runToEnd();
    this.#turnWhile(() => this.cache.flush(this.nowMs));
    if (keepHost) this.cache.sealHost();
    this.opened.tiers.close(keepHost);
    this.model.device.close();
  }

  #turnWhile(condition: () => boolean): void {
    for (let turn = 0; condition(); turn++) {
      if (turn > MAX_TURNS) throw new Error("the engine does not come to rest");
      this.turn();
    }
  }

  #note(event: ReturnType<Engine["step"]>[number]): void {
    if (event.type === "fail") throw new Error(`request ${event.request}: ${event.message}`);
    if (event.type === "begun") return;
    const key = event.request * 16 + event.choice;
    const answer = this.answers.get(key) ?? { tokens: [], logits: [], finish: null };
    this.answers.set(key, answer);
    if (event.type === "finish") {
      answer.finish = event;
      return;
    }
    answer.tokens.push(event.token);
    if (event.top.length > 0) answer.logits.push(BigInt(event.top[0]!.id) * 2n ** 32n + BigInt(event.top[0]!.logprob));
  }
}

/** Shared-memory name of the host tier of these data. */
export function hostNameOf(data: string): string {
  return `/kvasir-test-${Bun.hash.xxHash64(data).toString(16)}`;
}

export function diskPathOf(data: string): string {
  return join(data, "blocks");
}

function workerOptions({ device }: Model, options: ModelEngineOptions): EngineWorkerOptions {
  const { slotBytes } = device.blockBytes();
  const { data, hostBlocks = 0, diskBlocks = 0 } = options;
  return {
    libraryPath: cpuLibraryPath, modelDirectory: options.model, randomWeights: false, maxModelLen: null,
    maxNumSeqs: device.config.maxSequences, maxBatchTokens: device.config.maxRows, maxWaiting: 1000,
    blockTokens: device.config.blockTokens, gpuBlocks: null, gpuMemoryBytes: null, gpuMemoryUtilization: 1,
    kvDtype: "auto", computeDtype: "auto", quantization: "none", threads: 0, gpuIndex: 0,
    cache: {
      hostBytes: hostBlocks * (slotBytes + HEADER_BYTES), hostName: hostNameOf(data), keepHostCache: false,
      diskBytes: diskBlocks === 0 ? 0 : diskFileBytes(diskBlocks, slotBytes), diskPath: diskPathOf(data),
      diskAdmission: "idle", diskIdleMs: 1000, ioThreads: 4, tiers: "auto", policy: "scheduler-aware",
      recompute: "never", preloadLayers: null, maxLoadStallMs: 1, loadAheadBlocks: null, keepBlocks: 1,
      truncationRatio: 0.5, ...options.cache,
    },
  };
}

/** Results carry, in place of rivals, a hash of all logits. */
class RecordingBatch extends Batch {
  readonly logits: HostBuffer;
  readonly #rowBytes: number;

  constructor({ device, config }: Model, limits: BatchLimits) {
    super(device, limits);
    this.#rowBytes = config.vocabSize * 4;
    this.logits = device.allocHost(limits.maxSequences * this.#rowBytes);
  }

  override result(logitRow: number): SampledToken {
    const row = new Uint8Array(this.logits.bytes, logitRow * this.#rowBytes, this.#rowBytes);
    const hash = Bun.hash.xxHash64(row);
    return { ...super.result(logitRow), top: [{ id: Number(hash >> 32n), logprob: Number(hash & 0xffffffffn) }] };
  }
}

/** Copies the logits out before they are sampled. */
class RecordingRunner extends ModelRunner {
  override run(batch: Batch, hooks: ForwardHooks | null): void {
    const { device, config, logits } = this.model;
    const { logitCount } = batch;
    batch.seal();
    device.beginStep(batch.stepAddress, batch.stepBytes);
    this.model.computeLogits(batch, hooks);
    if (logitCount > 0) {
      device.copyOut((batch as RecordingBatch).logits.address, logits, logitCount * config.vocabSize * 4);
      device.sample({ logits, results: batch.resultsAddress, logitCount });
    }
    device.record("compute", batch.finished, true);
  }
}
