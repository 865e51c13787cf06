// A model with sequences in hand-made block tables: tests feed rows of any sequences in one step and get all
// their logits. Blocks are handed out in shuffled order, so that nothing works only with neighbours.

import type { HostBuffer, Isa } from "../../sidecar/native.ts";
import { Batch, type BatchSequence } from "../../sidecar/model/batch.ts";
import { loadModel, type Model, type Quantization } from "../../sidecar/model/model.ts";
import type { WeightDtype } from "../../sidecar/model/model-config.ts";
import type { ForwardHooks } from "../../sidecar/model/decoder.ts";
import { cpuLibraryPath } from "./cpu-library.ts";
import { SeededRandom } from "./seeded-random.ts";

const MAX_ROWS = 256;
const MAX_SEQUENCES = 4;
const WAIT_US = 10_000_000;

export interface TestModelOptions {
  /** Default: the CPU library. */
  readonly libraryPath?: string;
  readonly computeDtype?: WeightDtype;
  readonly quantization?: Quantization;
  readonly blockTokens?: number;
  readonly kvDtype?: WeightDtype;
  readonly isa?: Isa;
  readonly threads?: number;
  readonly maxModelLen?: number;
}

/** Tokens whose KV lies in the blocks of `table`, from view position 0. */
export interface TestSequence {
  readonly slot: number;
  readonly table: number[];
  /** View position of the next row. */
  position: number;
}

/** Rows to compute: the sequence's next tokens. */
export interface TestRows {
  readonly sequence: TestSequence;
  readonly ids: ArrayLike<number>;
}

export class TestModel {
  readonly #batch: Batch;
  readonly #logits: HostBuffer;
  readonly #blockCount: number;
  #freeBlocks: number[] = [];
  #slotCount = 0;

  private constructor(readonly model: Model) {
    const { device, config, maxLogits } = model;
    const { blockTokens, maxPositions } = device.config;
    const maxBlocksPerSequence = Math.ceil((maxPositions + 1) / blockTokens);
    this.#blockCount = MAX_SEQUENCES * maxBlocksPerSequence;
    device.createKv(this.#blockCount);
    this.#batch = new Batch(device, {
      maxRows: MAX_ROWS,
      maxSequences: MAX_SEQUENCES,
      maxBlocksPerSequence,
      maxBiases: 16,
    });
    this.#logits = device.allocHost(maxLogits * config.vocabSize * 4);
    this.reset();
  }

  static async load(directory: string, options: TestModelOptions = {}): Promise<TestModel> {
    const model = await loadModel({
      libraryPath: options.libraryPath ?? cpuLibraryPath,
      directory,
      randomWeights: false,
      maxModelLen: options.maxModelLen ?? null,
      maxRows: MAX_ROWS,
      maxSequences: MAX_SEQUENCES,
      maxLogits: MAX_ROWS,
      blockTokens: options.blockTokens ?? 8,
      kvDtype: options.kvDtype ?? "f32",
      computeDtype: options.computeDtype ?? "auto",
      quantization: options.quantization ?? "none",
      threads: options.threads ?? 2,
      gpuIndex: 0,
      isa: options.isa ?? "best",
      onProgress: () => {},
    });
    return new TestModel(model);
  }

  /** A sequence over its own slot; over the given blocks where an earlier one's are to be reused. */
  sequence(table: readonly number[] = [], position = 0): TestSequence {
    if (this.#slotCount === MAX_SEQUENCES) throw new Error("the test model has no slot left: reset it");
    return { slot: this.#slotCount++, table: [...table], position };
  }

  /** Forgets all sequences. */
  reset(): void {
    this.#slotCount = 0;
    const blocks = Array.from({ length: this.#blockCount }, (_, block) => block);
    this.#freeBlocks = new SeededRandom(7).shuffled(blocks);
  }

  /** Computes one step. Returns the logits of each part's rows, one after the other. */
  step(parts: readonly TestRows[], hooks: ForwardHooks | null = null): Float32Array[] {
    const { device, config } = this.model;
    this.#fill(parts, "all");
    device.beginStep(this.#batch.stepAddress, this.#batch.stepBytes);
    this.model.computeLogits(this.#batch, hooks);
    const bytes = this.#batch.logitCount * config.vocabSize * 4;
    device.copyOut(this.#logits.address, this.model.logits, bytes);
    this.#finish();
    let at = 0;
    return parts.map(({ ids }) => {
      const begin = at;
      at += ids.length * config.vocabSize * 4;
      return new Float32Array(this.#logits.bytes.slice(begin, at));
    });
  }

  /** Computes one step and samples greedily from the last row of each part. */
  greedyStep(parts: readonly TestRows[]): number[] {
    this.#run(parts, "last");
    return parts.map((_, index) => this.#batch.result(index).token);
  }

  /** Computes the KV of ids, without logits. */
  prefill(sequence: TestSequence, ids: Int32Array): void {
    for (let at = 0; at < ids.length; at += MAX_ROWS) {
      this.#run([{ sequence, ids: ids.subarray(at, at + MAX_ROWS) }], "none");
    }
  }

  /** Greedy continuation: tokens until `isEnd`, which is left out, or `count` of them. */
  greedy(
    sequence: TestSequence,
    prompt: Int32Array,
    count: number,
    isEnd: (id: number) => boolean = () => false,
  ): number[] {
    this.prefill(sequence, prompt.subarray(0, -1));
    let next = this.greedyStep([{ sequence, ids: prompt.subarray(-1) }])[0]!;
    const ids: number[] = [];
    while (!isEnd(next)) {
      ids.push(next);
      if (ids.length === count) break;
      next = this.greedyStep([{ sequence, ids: [next] }])[0]!;
    }
    return ids;
  }

  [Symbol.dispose](): void {
    this.model.device.close();
  }

  #run(parts: readonly TestRows[], logits: "none" | "last"): void {
    this.#fill(parts, logits);
    this.model.device.beginStep(this.#batch.stepAddress, this.#batch.stepBytes);
    this.model.forward(this.#batch);
    this.#finish();
  }

  #fill(parts: readonly TestRows[], logits: BatchSequence["logits"]): void {
    this.#batch.reset();
    for (const { sequence, ids } of parts) {
      this.model.device.writeTokens(sequence.slot, sequence.position, Int32Array.from(ids));
      const blockCount = Math.ceil((sequence.position + ids.length) / this.model.device.config.blockTokens);
      while (sequence.table.length < blockCount) sequence.table.push(this.#freeBlocks.pop()!);
      this.#batch.add({
        slot: sequence.slot,
        position: sequence.position,
        rowCount: ids.length,
        blockTable: sequence.table,
        logits,
        sampling: null,
        promptLength: sequence.position,
        rngPosition: 0,
      });
      sequence.position += ids.length;
    }
    if (logits === "last") this.model.prepare(this.#batch);
    this.#batch.seal();
  }

  #finish(): void {
    const { device } = this.model;
    device.record("compute", this.#batch.finished, true);
    while (!device.isDone(this.#batch.finished)) device.wait(WAIT_US);
  }
}
