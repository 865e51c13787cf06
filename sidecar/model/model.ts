// A loaded model: its weights and workspace on a device, and forward(), which enqueues one step.

import { basename } from "node:path";
import { assert } from "../assert.ts";
import {
  type Device,
  type DeviceAddress,
  type DeviceConfig,
  DTYPE_BYTES,
  type DType,
  type Isa,
  NativeLibrary,
  NO_ADDRESS,
} from "../native.ts";
import { loadModelConfig } from "./architecture.ts";
import type { Batch } from "./batch.ts";
import { DecodeGraphs } from "./decode-graph.ts";
import { type Decoder, type ForwardHooks, Step } from "./decoder.ts";
import { type GenerationConfig, loadGenerationConfig } from "./generation-config.ts";
import { checkWeights, makeUpWeights, uploadWeights } from "./load-weights.ts";
import type { ModelConfig, WeightDtype } from "./model-config.ts";
import { ModelError } from "./model-error.ts";
import { alibiSlopes } from "./rope.ts";
import { Checkpoint } from "./safetensors.ts";
import type { MatrixStorage } from "./weights.ts";

export type Quantization = "none" | "fp8";

export interface LoadModelOptions {
  /** libkvasir_cpu.so or libkvasir_cuda.so. */
  readonly libraryPath: string;
  /** Hugging Face directory. */
  readonly directory: string;
  /** Take only config.json and make up the weights. */
  readonly randomWeights: boolean;
  /** Prompt and answer together, in tokens; null: what the model was made for. */
  readonly maxModelLen: number | null;
  /** Most tokens of one step. */
  readonly maxRows: number;
  readonly maxSequences: number;
  /** Most logit rows of one step; default: one for each sequence. */
  readonly maxLogits?: number;
  readonly blockTokens: number;
  /** auto: as the weights. */
  readonly kvDtype: "auto" | WeightDtype;
  /** Of activations; auto: as the weights, 16 bits for F32 ones. The CPU library computes in f32 whatever
   * this says. */
  readonly computeDtype: "auto" | WeightDtype;
  /** fp8: the layers' matrices in E4M3 with a scale a row, and so are activations where more than 64 rows are computed
   * at once (Hopper; 16 elsewhere): with fewer, only bytes of weights count, and activations keep their 16 bits. GPU
   * only. */
  readonly quantization: Quantization;
  /** CPU compute threads; 0: cores - 1. */
  readonly threads: number;
  readonly gpuIndex: number;
  /** CPU code path; for tests. */
  readonly isa?: Isa;
  readonly onProgress: (message: string) => void;
}

/** Of KV bytes and block ids: raise when what is stored in a block changes. */
const KV_LAYOUT_VERSION = 1;

export class Model {
  readonly #decoder: Decoder;
  readonly #step: Step;
  readonly #graphs: DecodeGraphs;
  /** (maxLogits, hidden) F32, the same normed in the compute dtype, and (maxLogits, vocab) F32. */
  readonly #gathered: DeviceAddress;
  readonly #normed: DeviceAddress;
  readonly logits: DeviceAddress;

  constructor(
    readonly device: Device,
    readonly config: ModelConfig,
    decoder: Decoder,
    readonly generation: GenerationConfig,
    /** Names everything that changes the numbers in a KV block. */
    readonly fingerprint: string,
    readonly maxLogits: number,
    /** By which loading made free device memory less: on a GPU what the weights take. */
    readonly weightBytes: number,
  ) {
    const { computeDtype, maxSequences } = device.config;
    this.#decoder = decoder;
    this.#step = new Step(device, config);
    this.#graphs = new DecodeGraphs(device, maxSequences);
    this.#gathered = device.alloc(maxLogits * config.hiddenSize * DTYPE_BYTES.f32);
    this.#normed = device.alloc(maxLogits * config.hiddenSize * DTYPE_BYTES[computeDtype]);
    this.logits = device.alloc(maxLogits * config.vocabSize * DTYPE_BYTES.f32);
  }

  /** Longest sequence, in tokens. */
  get maxModelLen(): number {
    return this.device.config.maxPositions;
  }

  get eosTokens(): ReadonlySet<number> {
    return this.generation.eosTokens;
  }

  /** Pads a decode batch to the size of a captured graph. Optional; before the batch is sealed. */
  prepare(batch: Batch): void {
    this.#graphs.prepare(batch);
  }

  /** Enqueues a step that has begun: its rows through all layers, logits, sampled tokens. With hooks, no
   * graph is used. */
  forward(batch: Batch, hooks: ForwardHooks | null = null): void {
    if (hooks === null) this.#graphs.run(batch, () => this.computeLogits(batch, null));
    else this.computeLogits(batch, hooks);
    const { logitCount, resultsAddress: results } = batch;
    if (logitCount > 0) this.device.sample({ logits: this.logits, results, logitCount });
  }

  /** forward() without sampling, which overwrites the logits. */
  computeLogits(batch: Batch, hooks: ForwardHooks | null): void {
    const { rowCount, logitCount } = batch;
    assert(logitCount <= this.maxLogits, `${logitCount} logit rows, room for ${this.maxLogits}`);
    const step = this.#step;
    step.rowCount = rowCount;
    step.hooks = hooks;
    this.device.embed({ y: step.hidden, weight: this.#decoder.embedding, rowCount });
    for (let layer = 0; layer < this.config.layers; layer++) {
      this.#decoder.forwardLayer(layer, step);
      hooks?.afterLayer(layer);
    }
    if (logitCount === 0) return;
    // Norms act row by row: gathering first norms only the rows that are wanted.
    const gathered = this.#gathered;
    this.device.gatherLogitRows({ y: gathered, x: step.hidden, logitCount, size: this.config.hiddenSize });
    this.#decoder.finalNorm(step, this.#normed, gathered, logitCount);
    this.device.matmul({
      y: this.logits,
      x: this.#normed,
      weight: this.#decoder.outputMatrix,
      bias: NO_ADDRESS,
      rowCount: logitCount,
      output: "f32",
    });
  }
}

/** Throws ModelError (files, fields, tensors) or NativeError (library, memory). */
export async function loadModel(options: LoadModelOptions): Promise<Model> {
  const config = loadModelConfig(options.directory);
  if (options.quantization === "fp8") checkFp8(config, options);
  const generation = loadGenerationConfig(options.directory);
  const checkpoint = options.randomWeights ? null : new Checkpoint(options.directory);
  let device: Device | null = null;
  try {
    const check = checkpoint === null ? null : checkWeights(config, checkpoint, options.onProgress);
    const fixed = deviceConfig(config, check?.dtype ?? config.dtype, options);
    const library = new NativeLibrary(options.libraryPath);
    device = library.openDevice(fixed);
    setPositions(device, config);
    const { freeBytes } = device.memoryInfo();
    const storage = matrixStorage(fixed.computeDtype as WeightDtype, options);
    const { decoder, hash } =
      check === null
        ? makeUpWeights(device, config, storage)
        : uploadWeights(library, device, config, check, storage, options.onProgress);
    const fingerprint = fingerprintOf(device, config, options.quantization, hash);
    const maxLogits = options.maxLogits ?? options.maxSequences;
    const weightBytes = freeBytes - device.memoryInfo().freeBytes;
    return new Model(device, config, decoder, generation, fingerprint, maxLogits, weightBytes);
  } catch (error) {
    device?.close();
    throw error;
  } finally {
    checkpoint?.close();
  }
}

function deviceConfig(
  config: ModelConfig,
  weightDtype: WeightDtype,
  options: LoadModelOptions,
): DeviceConfig {
  const maxPositions = options.maxModelLen ?? config.maxPositions;
  if (maxPositions > config.maxPositions) {
    const made = `the model was made for ${config.maxPositions} tokens`;
    const reason = `${made}: --max-model-len ${maxPositions} is too long`;
    throw new ModelError(config.file, "max_position_embeddings", reason);
  }
  return {
    layers: config.layers,
    hiddenSize: config.hiddenSize,
    heads: config.heads,
    kvHeads: config.kvHeads,
    headDim: config.headDim,
    rotaryDim: config.rope?.rotaryDim ?? 0,
    vocabSize: config.vocabSize,
    blockTokens: options.blockTokens,
    maxPositions,
    maxRows: options.maxRows,
    maxSequences: options.maxSequences,
    computeDtype: computeDtypeOf(weightDtype, options),
    kvDtype: options.kvDtype === "auto" ? weightDtype : options.kvDtype,
    attentionScale: 1 / Math.sqrt(config.headDim),
    threadCount: options.threads,
    isa: options.isa ?? "best",
    gpuIndex: options.gpuIndex,
  };
}

/** On a GPU, matrices are kept in the dtype that they are multiplied in. */
function matrixStorage(computeDtype: WeightDtype, options: LoadModelOptions): MatrixStorage {
  if (!isCuda(options)) return { layers: null, vocabulary: null };
  return { layers: options.quantization === "fp8" ? "f8e4m3" : computeDtype, vocabulary: computeDtype };
}

function checkFp8(config: ModelConfig, options: LoadModelOptions): void {
  const reason = !isCuda(options)
    ? "needs a GPU: the CPU library multiplies no FP8"
    : options.computeDtype === "f32"
      ? "is for 16-bit activations: --compute-dtype bf16 or f16"
      : null;
  if (reason !== null) throw new ModelError(config.file, "--quantization fp8", reason);
}

function computeDtypeOf(weightDtype: WeightDtype, options: LoadModelOptions): DType {
  if (!isCuda(options)) return "f32";
  if (options.computeDtype !== "auto") return options.computeDtype;
  return weightDtype === "f32" ? "bf16" : weightDtype;
}

function isCuda({ libraryPath }: LoadModelOptions): boolean {
  return basename(libraryPath).includes("cuda");
}

function setPositions(device: Device, config: ModelConfig): void {
  if (config.rope !== null) {
    device.setRope(config.rope.inverseFrequencies);
    return;
  }
  // Falcon adds ALiBi before it scales the scores; the operation adds it after.
  const scale = device.config.attentionScale;
  device.setAlibi(alibiSlopes(config.heads).map((slope) => slope * scale));
}

/** The fingerprint: two devices with the same one compute the same KV for the same tokens. */
function fingerprintOf(
  device: Device,
  config: ModelConfig,
  quantization: Quantization,
  weightsHash: string,
): string {
  const { computeDtype, kvDtype, blockTokens, attentionScale } = device.config;
  const info = device.info();
  const { file: _, rope, ...shape } = config;
  return JSON.stringify({
    layout: KV_LAYOUT_VERSION,
    weights: weightsHash,
    shape,
    quantization,
    rope: rope === null ? null : [...rope.inverseFrequencies],
    computeDtype,
    kvDtype,
    blockTokens,
    attentionScale,
    backend: info["backend"],
    numericMode: info["numeric_mode"],
  });
}
