// Decode steps as captured graphs: on a GPU, launching some hundred kernels one by one costs more than
// running them. A graph has a fixed number of rows, so decode batches are padded up to the next bucket, and
// each bucket is captured the first time it is met.

import type { Device } from "../native.ts";
import type { Batch } from "./batch.ts";

/** 1, 2, 4, then every 8. */
export function decodeBuckets(maxSequences: number): number[] {
  const buckets = [1, 2, 4].filter((size) => size < maxSequences);
  for (let size = 8; size < maxSequences; size += 8) buckets.push(size);
  buckets.push(maxSequences);
  return buckets;
}

export class DecodeGraphs {
  readonly #buckets: readonly number[];
  readonly #captured = new Set<number>();
  /** Bucket of each prepared batch, until it runs. */
  readonly #prepared = new WeakMap<Batch, number>();
  /** Until the first capture: unknown, taken for true. */
  #isSupported = true;

  constructor(
    readonly device: Device,
    maxSequences: number,
  ) {
    this.#buckets = decodeBuckets(maxSequences);
  }

  /** Pads a batch whose every sequence decodes one token. Call before the batch is sealed. */
  prepare(batch: Batch): void {
    const count = batch.sequenceCount;
    const isDecode = count > 0 && batch.rowCount === count && batch.logitCount === count;
    if (!this.#isSupported || !isDecode) return;
    const bucket = this.#buckets.find((size) => size >= count);
    if (bucket === undefined || bucket > batch.limits.maxRows) return;
    batch.padTo(bucket, bucket);
    this.#prepared.set(batch, bucket);
  }

  /** Enqueues `operations`, which must depend on the step's input alone: as a graph where the batch was
   * prepared. */
  run(batch: Batch, operations: () => void): void {
    const bucket = this.#prepared.get(batch);
    this.#prepared.delete(batch);
    if (bucket === undefined) {
      operations();
    } else if (this.#captured.has(bucket)) {
      this.device.graphLaunch(bucket);
    } else if (this.device.graphBegin(bucket)) {
      operations();
      this.device.graphEnd(bucket);
      this.#captured.add(bucket);
    } else {
      this.#isSupported = false;
      operations();
    }
  }
}
