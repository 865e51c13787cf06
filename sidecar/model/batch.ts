// One step's input: the rows (tokens) of the sequences that run in it, written straight into the memory that the
// device reads (kvs_step_header and its arrays, native/kvasir.h). Two of them take turns: one is filled while
// the device still works on the other.

import { assert } from "../assert.ts";
import type { Device, EventHandle, HostAddress, HostBuffer } from "../native.ts";

const HEADER_INTS = 12;
const SEQUENCE_INTS = 4;
const SAMPLING_INTS = 16;
const RESULT_INTS = 44;
/** Rival tokens that a result can carry. */
export const TOP_LOGPROBS_MAX = 20;

/** How to turn one row of logits into a token; see kvs_step_sampling for meaning and order. */
export interface RowSampling {
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly frequencyPenalty: number;
  readonly presencePenalty: number;
  readonly repetitionPenalty: number;
  readonly seed: number;
  /** [token id, bias] */
  readonly logitBias: readonly (readonly [number, number])[];
  /** null: none. */
  readonly logprobs: number | null;
}

/** Rows of one sequence in a step. */
export interface BatchSequence {
  /** Row of the device's token buffer. */
  readonly slot: number;
  /** View position of its first row; the rows' token ids lie at tokens[slot][position]. */
  readonly position: number;
  readonly rowCount: number;
  /** Gpu block of each blockTokens positions, from position 0 to the last row's. */
  readonly blockTable: ArrayLike<number>;
  /** Which of its rows want logits: none, the last (and sample it), or all (no sampling; tests). */
  readonly logits: "none" | "last" | "all";
  readonly sampling: RowSampling | null;
  /** Tokens [0, promptLength) of the slot are the prompt (penalties look past them). */
  readonly promptLength: number;
  /** Index of the token to be sampled within the whole conversation: counter of the random numbers. */
  readonly rngPosition: number;
}

/** Capacities, fixed at start. */
export interface BatchLimits {
  readonly maxRows: number;
  readonly maxSequences: number;
  /** Longest block table of one sequence. */
  readonly maxBlocksPerSequence: number;
  /** Logit biases of all rows of a step together. */
  readonly maxBiases: number;
}

/** What the device chose for one logit row. */
export interface SampledToken {
  /** -1: the logits held NaN or nothing finite. */
  readonly token: number;
  readonly logprob: number;
  readonly top: readonly { id: number; logprob: number }[];
}

const GREEDY: RowSampling = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  frequencyPenalty: 0,
  presencePenalty: 0,
  repetitionPenalty: 1,
  seed: 0,
  logitBias: [],
  logprobs: null,
};

export class Batch {
  /** Done when the device has finished the step, results included. */
  readonly finished: EventHandle;
  readonly #step: HostBuffer;
  readonly #ints: Int32Array;
  readonly #floats: Float32Array;
  readonly #results: HostBuffer;
  readonly #resultInts: Int32Array;
  readonly #resultFloats: Float32Array;
  readonly #at: Readonly<Layout>;
  readonly #blockTokens: number;
  rowCount = 0;
  sequenceCount = 0;
  logitCount = 0;
  #tableCount = 0;
  #biasCount = 0;

  constructor(
    device: Device,
    readonly limits: BatchLimits,
  ) {
    this.#at = layout(limits);
    this.#blockTokens = device.config.blockTokens;
    this.#step = device.allocHost(this.#at.end * 4);
    this.#ints = new Int32Array(this.#step.bytes);
    this.#floats = new Float32Array(this.#step.bytes);
    this.#results = device.allocHost(limits.maxRows * RESULT_INTS * 4);
    this.#resultInts = new Int32Array(this.#results.bytes);
    this.#resultFloats = new Float32Array(this.#results.bytes);
    this.finished = device.createEvent();
  }

  get stepAddress(): HostAddress {
    return this.#step.address;
  }

  get resultsAddress(): HostAddress {
    return this.#results.address;
  }

  /** Bytes of the step input in use: all arrays up to the end of the block table. */
  get stepBytes(): number {
    return (this.#at.blockTable + this.#tableCount) * 4;
  }

  /** Empties the batch. Only when `finished` is done. */
  reset(): void {
    this.rowCount = 0;
    this.sequenceCount = 0;
    this.logitCount = 0;
    this.#tableCount = 0;
    this.#biasCount = 0;
  }

  /** Rows and biases still fit? */
  hasRoomFor(rowCount: number, biasCount: number): boolean {
    return (
      this.rowCount + rowCount <= this.limits.maxRows &&
      this.sequenceCount < this.limits.maxSequences &&
      this.#biasCount + biasCount <= this.limits.maxBiases
    );
  }

  /** Returns the index of its (first) logit row, or -1 when it wants none. */
  add(sequence: BatchSequence): number {
    const { rowCount, position } = sequence;
    assert(rowCount > 0, "a sequence in a step has rows");
    assert(this.hasRoomFor(rowCount, sequence.sampling?.logitBias.length ?? 0), "the batch is full");
    const blockCount = Math.ceil((position + rowCount) / this.#blockTokens);
    assert(sequence.blockTable.length >= blockCount, "the block table does not cover the rows");
    assert(blockCount <= this.limits.maxBlocksPerSequence, "the block table is too long");

    const index = this.sequenceCount++;
    const rowBegin = this.rowCount;
    const record = this.#at.sequences + index * SEQUENCE_INTS;
    this.#ints[record] = sequence.slot;
    this.#ints[record + 1] = rowBegin;
    this.#ints[record + 2] = rowCount;
    this.#ints[record + 3] = this.#tableCount;
    for (let j = 0; j < blockCount; j++) {
      this.#ints[this.#at.blockTable + this.#tableCount++] = sequence.blockTable[j]!;
    }
    for (let i = 0; i < rowCount; i++) {
      this.#ints[this.#at.rowSequence + rowBegin + i] = index;
      this.#ints[this.#at.rowPosition + rowBegin + i] = position + i;
    }
    this.rowCount += rowCount;
    if (sequence.logits === "none") return -1;
    const firstLogit = this.logitCount;
    const first = sequence.logits === "all" ? 0 : rowCount - 1;
    for (let i = first; i < rowCount; i++) this.#addLogitRow(index, rowBegin + i, sequence);
    return firstLogit;
  }

  /** Adds rows that compute garbage and store nothing, for a graph captured at a larger size. */
  padTo(rowCount: number, logitCount: number): void {
    assert(rowCount <= this.limits.maxRows && logitCount <= this.limits.maxRows, "padding past the end");
    while (this.rowCount < rowCount) {
      this.#ints[this.#at.rowSequence + this.rowCount] = -1;
      this.#ints[this.#at.rowPosition + this.rowCount] = 0;
      this.rowCount++;
    }
    while (this.logitCount < logitCount) {
      const index = this.logitCount++;
      this.#ints[this.#at.logitRow + index] = 0;
      this.#ints[this.#at.sampling + index * SAMPLING_INTS] = -1;
    }
  }

  /** Writes the header. Call before the step begins. */
  seal(): void {
    const at = this.#at;
    this.#ints.set([
      this.rowCount,
      this.sequenceCount,
      this.logitCount,
      at.sequences,
      at.rowSequence,
      at.rowPosition,
      at.blockTable,
      at.logitRow,
      at.sampling,
      at.biasId,
      at.biasValue,
      0,
    ]);
  }

  /** What was sampled for a logit row; valid once `finished` is done and until the next reset. */
  result(logitRow: number): SampledToken {
    const at = logitRow * RESULT_INTS;
    const topCount = this.#resultInts[at + 2]!;
    const top = [];
    for (let i = 0; i < topCount; i++) {
      top.push({
        id: this.#resultInts[at + 4 + i]!,
        logprob: this.#resultFloats[at + 4 + TOP_LOGPROBS_MAX + i]!,
      });
    }
    return { token: this.#resultInts[at]!, logprob: this.#resultFloats[at + 1]!, top };
  }

  #addLogitRow(sequenceIndex: number, row: number, sequence: BatchSequence): void {
    const index = this.logitCount++;
    this.#ints[this.#at.logitRow + index] = row;
    const sampling = sequence.sampling ?? GREEDY;
    const at = this.#at.sampling + index * SAMPLING_INTS;
    this.#ints[at] = sequenceIndex;
    this.#floats[at + 1] = sampling.temperature;
    this.#ints[at + 2] = sampling.topK;
    this.#floats[at + 3] = sampling.topP;
    this.#floats[at + 4] = sampling.minP;
    this.#floats[at + 5] = sampling.frequencyPenalty;
    this.#floats[at + 6] = sampling.presencePenalty;
    this.#floats[at + 7] = sampling.repetitionPenalty;
    this.#ints[at + 8] = sequence.promptLength;
    this.#ints[at + 9] = sampling.seed % 2 ** 32 | 0;
    this.#ints[at + 10] = Math.floor(sampling.seed / 2 ** 32) | 0;
    this.#ints[at + 11] = sequence.rngPosition;
    this.#ints[at + 12] = this.#biasCount;
    this.#ints[at + 13] = sampling.logitBias.length;
    this.#ints[at + 14] = sampling.logprobs ?? -1;
    this.#ints[at + 15] = sequence.logits === "last" ? 1 : 0;
    for (const [id, bias] of sampling.logitBias) {
      this.#ints[this.#at.biasId + this.#biasCount] = id;
      this.#floats[this.#at.biasValue + this.#biasCount++] = bias;
    }
  }
}

interface Layout {
  sequences: number;
  rowSequence: number;
  rowPosition: number;
  logitRow: number;
  sampling: number;
  biasId: number;
  biasValue: number;
  blockTable: number;
  end: number;
}

/** Offsets in int32s. The block table comes last: it is the one array whose used part varies much. */
function layout(limits: BatchLimits): Layout {
  let at = HEADER_INTS;
  const take = (ints: number): number => {
    const begin = at;
    at += Math.ceil(ints / 4) * 4;
    return begin;
  };
  const sequences = take(limits.maxSequences * SEQUENCE_INTS);
  const rowSequence = take(limits.maxRows);
  const rowPosition = take(limits.maxRows);
  const logitRow = take(limits.maxRows);
  const sampling = take(limits.maxRows * SAMPLING_INTS);
  const biasId = take(limits.maxBiases);
  const biasValue = take(limits.maxBiases);
  const blockTable = take(limits.maxSequences * limits.maxBlocksPerSequence);
  return {
    sequences, rowSequence, rowPosition, logitRow, sampling, biasId, biasValue, blockTable, end: at,
  };
}
