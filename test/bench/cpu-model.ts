// A model on the CPU library as bench/cpu.ts drives it: prefill and decode of one or more sequences, one step ahead
// of the results, as the engine does.

import { cpuLibraryPath } from "../support/cpu-library.ts";
import { Batch } from "../../sidecar/model/batch.ts";
import { loadModel, type Model } from "../../sidecar/model/model.ts";
import type { ModelConfig } from "../../sidecar/model/model-config.ts";
import type { Isa } from "../../sidecar/native.ts";

const BLOCK_TOKENS = 64;
const WAIT_US = 600_000_000;

export interface BenchModelOptions {
  readonly directory: string;
  readonly randomWeights: boolean;
  readonly threads: number;
  readonly isa: Isa;
  readonly maxRows: number;
  readonly sequences: number;
}

export class BenchModel {
  readonly #batches: readonly [Batch, Batch];
  readonly #tables: readonly number[][];
  readonly config: ModelConfig;

  private constructor(readonly model: Model, sequences: number, maxRows: number) {
    const { device } = model;
    this.config = model.config;
    const blocks = Math.ceil(model.maxModelLen / BLOCK_TOKENS);
    device.createKv(sequences * blocks);
    this.#tables = Array.from({ length: sequences }, (_, sequence) =>
      Array.from({ length: blocks }, (_, block) => sequence * blocks + block),
    );
    const limits = { maxRows, maxSequences: sequences, maxBlocksPerSequence: blocks, maxBiases: 1 };
    this.#batches = [new Batch(device, limits), new Batch(device, limits)];
    const ids = Int32Array.from({ length: model.maxModelLen }, (_, i) => (i * 7919 + 13) % this.config.vocabSize);
    for (let sequence = 0; sequence < sequences; sequence++) device.writeTokens(sequence, 0, ids);
  }

  static async load(options: BenchModelOptions): Promise<BenchModel> {
    const model = await loadModel({
      libraryPath: cpuLibraryPath,
      directory: options.directory,
      randomWeights: options.randomWeights,
      maxModelLen: null,
      maxRows: options.maxRows,
      maxSequences: options.sequences,
      blockTokens: BLOCK_TOKENS,
      kvDtype: "auto",
      computeDtype: "auto",
      quantization: "none",
      threads: options.threads,
      gpuIndex: 0,
      isa: options.isa,
      onProgress: () => {},
    });
    return new BenchModel(model, options.sequences, options.maxRows);
  }

  /** Milliseconds from a prompt of `count` tokens to its first token. */
  prefill(count: number): number {
    const beginMs = performance.now();
    this.#run(this.#batches[0], 0, count, 1);
    this.#finish(this.#batches[0]);
    return performance.now() - beginMs;
  }

  /** Milliseconds of a decode step of `sequences` sequences, over `steps` of them from `position` on. */
  decode(position: number, steps: number, sequences = 1): number {
    this.#run(this.#batches[0], position - 1, 1, sequences);
    this.#finish(this.#batches[0]);
    const beginMs = performance.now();
    for (let step = 0; step <= steps; step++) {
      if (step < steps) this.#run(this.#batches[step % 2]!, position + step, 1, sequences);
      if (step > 0) this.#finish(this.#batches[(step - 1) % 2]!);
    }
    return (performance.now() - beginMs) / steps;
  }

  /** Weights that every row is multiplied with; the output matrix only where logits are wanted. */
  get matrixParameters(): { layers: number; output: number } {
    const { hiddenSize, intermediateSize, layers, heads, kvHeads, headDim, vocabSize, family } = this.config;
    const attention = hiddenSize * headDim * (2 * heads + 2 * kvHeads);
    const mlp = hiddenSize * intermediateSize * (family === "falcon" ? 2 : 3);
    return { layers: layers * (attention + mlp), output: hiddenSize * vocabSize };
  }

  /** Of a prompt of `count` tokens: products and causal attention, a multiply-add being two. */
  prefillFlops(count: number): number {
    const { layers, heads, headDim } = this.config;
    const attention = (layers * heads * headDim * 4 * count * (count + 1)) / 2;
    return 2 * (this.matrixParameters.layers * count + this.matrixParameters.output) + attention;
  }

  [Symbol.dispose](): void {
    this.model.device.close();
  }

  #run(batch: Batch, position: number, rowCount: number, sequences: number): void {
    batch.reset();
    for (let slot = 0; slot < sequences; slot++) {
      batch.add({
        slot,
        position,
        rowCount,
        blockTable: this.#tables[slot]!,
        logits: "last",
        sampling: null,
        promptLength: 0,
        rngPosition: 0,
      });
    }
    batch.seal();
    const { device } = this.model;
    device.beginStep(batch.stepAddress, batch.stepBytes);
    this.model.forward(batch);
    device.record("compute", batch.finished, true);
  }

  #finish(batch: Batch): void {
    const { device } = this.model;
    while (!device.isDone(batch.finished)) device.wait(WAIT_US);
    if (batch.result(0).token < 0) throw new Error("the step gave no token");
  }
}
