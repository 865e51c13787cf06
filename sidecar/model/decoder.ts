// What every architecture family has in common: the interface of a decoder, and a step's operations on the
// shared workspace, from which each family's file composes its layers.

import { type Device, type DeviceAddress, DTYPE_BYTES, NO_ADDRESS, type WeightHandle } from "../native.ts";
import type { JsonFields } from "./json-fields.ts";
import type { ModelConfig } from "./model-config.ts";
import type { WeightSource } from "./weights.ts";

/** An architecture family: how its config.json is read and what decoder that makes. Both throw ModelError. */
export interface Family<Config extends ModelConfig> {
  readConfig(fields: JsonFields): Config;
  load(config: Config, source: WeightSource): Decoder;
}

/** A loaded family: its weights on the device, and how they act on a step. */
export interface Decoder {
  /** (vocab, hidden) */
  readonly embedding: WeightHandle;
  /** (vocab, hidden); the embedding itself in tied models. */
  readonly outputMatrix: WeightHandle;
  /** hidden = layer(hidden) for every row of the step. */
  forwardLayer(layer: number, step: Step): void;
  /** y = the norm before the output matrix, of `rowCount` rows of x, which is f32. */
  finalNorm(step: Step, y: DeviceAddress, x: DeviceAddress, rowCount: number): void;
}

/** Called while a step is enqueued, so that others can order their streams by layer. */
export interface ForwardHooks {
  /** Before the first operation that touches this layer's KV blocks. */
  beforeAttention(layer: number): void;
  /** Behind the last one. */
  afterLayer(layer: number): void;
}

export interface AttentionWeights {
  /** ((heads + 2 kvHeads) headDim, hidden): q, k, v rows. */
  readonly qkv: WeightHandle;
  readonly qkvBias: DeviceAddress;
  /** (headDim) each, or none. */
  readonly qNorm: DeviceAddress;
  readonly kNorm: DeviceAddress;
  /** (hidden, heads headDim) */
  readonly output: WeightHandle;
  readonly outputBias: DeviceAddress;
}

export interface GatedMlpWeights {
  /** (2 intermediate, hidden): gate, up rows. */
  readonly gateUp: WeightHandle;
  readonly gateUpBias: DeviceAddress;
  /** (hidden, intermediate) */
  readonly down: WeightHandle;
  readonly downBias: DeviceAddress;
}

export interface PlainMlpWeights {
  /** (intermediate, hidden) */
  readonly up: WeightHandle;
  readonly upBias: DeviceAddress;
  /** (hidden, intermediate) */
  readonly down: WeightHandle;
  readonly downBias: DeviceAddress;
}

/** The step being enqueued: its row count, its hooks, and activations of (maxRows, ...) in the compute dtype; the
 * residual stream in f32, whose roundings would else be most of a 16-bit model's. */
export class Step {
  rowCount = 0;
  hooks: ForwardHooks | null = null;
  /** (rows, hidden) f32: the residual stream. */
  readonly hidden: DeviceAddress;
  /** (rows, hidden): inputs of attention and MLP; two, for families that run both on the same input. */
  readonly normed: DeviceAddress;
  readonly normedForMlp: DeviceAddress;
  readonly #qkv: DeviceAddress;
  readonly #q: DeviceAddress;
  readonly #attended: DeviceAddress;
  readonly #mlpIn: DeviceAddress;
  readonly #mlpOut: DeviceAddress;

  constructor(
    readonly device: Device,
    readonly config: ModelConfig,
  ) {
    const { heads, kvHeads, headDim, hiddenSize, intermediateSize, family } = config;
    const { maxRows, computeDtype } = device.config;
    const rows = (size: number): DeviceAddress => device.alloc(maxRows * size * DTYPE_BYTES[computeDtype]);
    this.hidden = device.alloc(maxRows * hiddenSize * DTYPE_BYTES.f32);
    this.normed = rows(hiddenSize);
    this.normedForMlp = family === "falcon" ? rows(hiddenSize) : NO_ADDRESS;
    this.#qkv = rows((heads + 2 * kvHeads) * headDim);
    this.#q = rows(heads * headDim);
    this.#attended = rows(heads * headDim);
    this.#mlpIn = rows(intermediateSize * (family === "falcon" ? 1 : 2));
    this.#mlpOut = rows(intermediateSize);
  }

  /** y = RMS norm of x, which is f32. */
  rmsNorm(y: DeviceAddress, x: DeviceAddress, weight: DeviceAddress, rowCount = this.rowCount): void {
    const { hiddenSize: size, normEpsilon: epsilon } = this.config;
    this.device.rmsNorm({ y, x, weight, rowCount, size, epsilon });
  }

  /** y = layer norm of x, which is f32. */
  layerNorm(
    y: DeviceAddress,
    x: DeviceAddress,
    { weight, bias }: { weight: DeviceAddress; bias: DeviceAddress },
    rowCount = this.rowCount,
  ): void {
    const { hiddenSize: size, normEpsilon: epsilon } = this.config;
    this.device.layerNorm({ y, x, weight, bias, rowCount, size, epsilon });
  }

  /** hidden += attention(x), with x (rows, hidden); stores the rows' keys and values in the layer's
   * blocks. */
  addAttention(layer: number, x: DeviceAddress, weights: AttentionWeights): void {
    const { device, rowCount } = this;
    this.#matmul(this.#qkv, x, weights.qkv, weights.qkvBias);
    this.hooks?.beforeAttention(layer);
    device.appendKv({
      q: this.#q,
      qkv: this.#qkv,
      layer,
      qNorm: weights.qNorm,
      kNorm: weights.kNorm,
      rowCount,
      epsilon: this.config.normEpsilon,
    });
    const window = this.config.windows[layer]!;
    device.attention({ y: this.#attended, q: this.#q, layer, window, rowCount });
    this.#addMatmul(this.#attended, weights.output, weights.outputBias);
  }

  /** hidden += down(silu(gate(x)) * up(x)), with x (rows, hidden). */
  addGatedMlp(x: DeviceAddress, weights: GatedMlpWeights): void {
    this.#matmul(this.#mlpIn, x, weights.gateUp, weights.gateUpBias);
    const size = this.config.intermediateSize;
    this.device.siluMul({ y: this.#mlpOut, x: this.#mlpIn, rowCount: this.rowCount, size });
    this.#addMatmul(this.#mlpOut, weights.down, weights.downBias);
  }

  /** hidden += down(gelu(up(x))), with x (rows, hidden). */
  addGeluMlp(x: DeviceAddress, weights: PlainMlpWeights): void {
    this.#matmul(this.#mlpIn, x, weights.up, weights.upBias);
    const size = this.config.intermediateSize;
    this.device.gelu({ y: this.#mlpOut, x: this.#mlpIn, rowCount: this.rowCount, size });
    this.#addMatmul(this.#mlpOut, weights.down, weights.downBias);
  }

  #matmul(y: DeviceAddress, x: DeviceAddress, weight: WeightHandle, bias: DeviceAddress): void {
    const { rowCount } = this;
    this.device.matmul({ y, x, weight, bias, rowCount, output: "computed" });
  }

  #addMatmul(x: DeviceAddress, weight: WeightHandle, bias: DeviceAddress): void {
    const { hidden: y, rowCount } = this;
    this.device.matmul({ y, x, weight, bias, rowCount, output: "added" });
  }
}
