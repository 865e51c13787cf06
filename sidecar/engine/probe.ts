// Measured once at start, before the first request: how long steps take on this device and how fast blocks come up from
// host memory. The choice between loading and computing starts from these, and goes on learning.

import type { KvCache } from "../kvcache/kv-cache.ts";
import { EventPool, LayerTransfer } from "../kvcache/layer-transfer.ts";
import type { Batch } from "../model/batch.ts";
import type { Model } from "../model/model.ts";
import type { ModelRunner } from "./model-runner.ts";

/** A step of one row, and one long enough for the rows to count and short enough for a slow machine. */
const PROBE_ROWS = [1, 64];
const PROBE_BLOCKS = 8;
const REPEATS = 3;
const WAIT_US = 1_000_000;

/** Fills the cache's meters. Nothing may be in use yet: the blocks are overwritten. */
export function probe(model: Model, runner: ModelRunner, cache: KvCache): void {
  const [batch] = runner.batches;
  for (let i = 0; i < REPEATS; i++) {
    for (const rows of PROBE_ROWS) {
      const beginMs = performance.now();
      const rowCount = prefill(model, runner, batch!, rows, cache.blockTokens);
      // The first one touches memory and picks algorithms: what it takes says nothing.
      if (i > 0) cache.stepTimes.note(rowCount, beginMs, performance.now());
    }
  }
  if (cache.residency.tiers.host === null) return;
  const events = new EventPool(model.device);
  for (let i = 0; i < REPEATS; i++) {
    const beginMs = performance.now();
    const count = load(model, cache, events, beginMs);
    if (i > 0) cache.moves.loadRate.note(count * cache.options.blockBytes, beginMs, performance.now());
  }
}

/** How fast a tier must be to beat computing on an idle device, in words. */
export function describeBreakEven({ costs, options, blockTokens }: KvCache): string {
  const bytesPerToken = options.blockBytes / blockTokens;
  const makes = costs.breakEven(bytesPerToken) ?? 0;
  const loads = costs.loadRate.perMs;
  const gigabytes = (bytesPerMs: number) => (bytesPerMs / 1e6).toPrecision(3);
  const host = loads === null ? "there is no host tier" : `host memory delivers ${gigabytes(loads)} GB/s`;
  return (
    `break-even: computing a prompt makes KV at ${gigabytes(makes)} GB/s ` +
    `(${Math.round((makes / bytesPerToken) * 1000)} tokens/s), a slower tier is not worth reading; ${host}`
  );
}

function prefill(model: Model, runner: ModelRunner, batch: Batch, rows: number, blockTokens: number): number {
  const rowCount = Math.min(rows, batch.limits.maxRows, model.maxModelLen - 1);
  const blockTable = Array.from({ length: Math.ceil((rowCount + 1) / blockTokens) }, (_, i) => i);
  runner.writeTokens(0, new Int32Array(rowCount).fill(1));
  batch.reset();
  const rest = { logits: "last", sampling: null, promptLength: rowCount, rngPosition: rowCount } as const;
  batch.add({ slot: 0, position: 0, rowCount, blockTable, ...rest });
  runner.run(batch, null);
  while (!runner.isFinished(batch)) model.device.wait(WAIT_US);
  return rowCount;
}

/** Returns how many blocks were loaded. */
function load({ device, config }: Model, cache: KvCache, events: EventPool, nowMs: number): number {
  const host = cache.residency.tiers.host!.pool;
  const count = Math.min(PROBE_BLOCKS, host.freeCount, cache.blockCount);
  if (count === 0) return 0;
  const slots = Int32Array.from({ length: count }, () => host.allocate()!);
  const blocks = Int32Array.from({ length: count }, (_, i) => i);
  const transfer = new LayerTransfer(device, events, "load", slots, blocks, config.layers, nowMs);
  while (!transfer.pump() || !transfer.isDone()) device.wait(WAIT_US / 1000);
  transfer.dispose();
  for (const slot of slots) host.release(slot);
  return count;
}
