// On a GPU, what is met for the first time is slow: the library's products are timed for each new number of rows, a
// decode graph is captured for each size, kernels are loaded. Here all of it is met before the first request is.

import type { Batch } from "../model/batch.ts";
import { decodeBuckets } from "../model/decode-graph.ts";
import type { ModelRunner } from "./model-runner.ts";

const WAIT_US = 1_000_000;
/** Larger steps and graphs are met when they come: beyond these sizes warming up would take longer than it saves. */
const ROWS_MAX = 8192;
const DECODE_ROWS_MAX = 256;
/** Up to here every number of rows counts. */
const EXACT_ROWS_MAX = 8;

/** Numbers of rows such that every step's products are like those of one of them: four between powers of two, as the
 * CUDA library rounds them (native/cuda/library-matmul.cpp). Rising. */
export function warmUpRows(maxRows: number): number[] {
  const rows = Array.from({ length: EXACT_ROWS_MAX - 1 }, (_, i) => i + 2);
  for (let power = EXACT_ROWS_MAX; power < maxRows; power *= 2) {
    for (const factor of [1.25, 1.5, 1.75, 2]) rows.push(power * factor);
  }
  return [...new Set(rows.map((count) => Math.min(count, maxRows)))];
}

/** Runs steps of all sizes. Nothing may be in use yet: KV blocks are overwritten. blockCount: of the gpu tier. */
export function warmUp(runner: ModelRunner, blockCount: number): void {
  const { maxRows, maxSequences } = runner.batches[0]!.limits;
  for (const rows of warmUpRows(Math.min(maxRows, ROWS_MAX))) {
    // One row less than one each, which would be a decode step: this is how logits of many rows come in a prefill.
    const sequences = Math.max(1, Math.min(rows - 1, maxSequences));
    runStep(runner, blockCount, rows, sequences);
  }
  const sizes = decodeBuckets(maxSequences).filter((size) => size <= DECODE_ROWS_MAX);
  for (const size of sizes) runStep(runner, blockCount, size, size);
}

/** A step of `rows` spread over sequences that begin at position 0. */
function runStep(runner: ModelRunner, blockCount: number, rows: number, sequences: number): void {
  const { device, maxModelLen } = runner.model;
  const { blockTokens } = device.config;
  const batch: Batch = runner.batches[0]!;
  batch.reset();
  let block = 0;
  for (let slot = 0; slot < sequences; slot++) {
    const share = Math.floor(rows / sequences) + (slot < rows % sequences ? 1 : 0);
    const rowCount = Math.min(share, maxModelLen - 1);
    runner.writeTokens(slot, new Int32Array(rowCount).fill(1));
    // Where blocks do not suffice, sequences overwrite each other's: nobody reads these numbers.
    const blockTable = Array.from({ length: Math.ceil(rowCount / blockTokens) }, () => block++ % blockCount);
    const rest = { logits: "last", sampling: null, promptLength: rowCount, rngPosition: rowCount } as const;
    batch.add({ slot, position: 0, rowCount, blockTable, ...rest });
  }
  runner.run(batch, null);
  while (!runner.isFinished(batch)) device.wait(WAIT_US);
}
