// Deleted means gone: whatever a request was doing when it ended, the blocks that it left can be found and removed, and
// no later process meets them, whatever the disk did.

import { expect, test } from "bun:test";
import { EngineHarness, type HarnessOptions } from "../../support/engine-harness.ts";
import { type DiskFaults, NO_FAULTS } from "../../support/faulty-disk.ts";
import { ask, ENDLESS, prompt } from "../../support/harness-turns.ts";

const IDLE_MS = 40;
/** Longer than the disk is left alone after failures, and than a failed erase waits. */
const PAUSE_MS = 31_000;

function crowded(options: HarnessOptions = {}): EngineHarness {
  const cache = { isExclusive: false };
  return new EngineHarness({ gpuBlocks: 9, maxModelLen: 64, hostSlots: 8, diskSlots: 64, cache, ...options });
}

function blockCount(harness: EngineHarness): number {
  return [...harness.cache.residency.index.blocks()].length;
}

/** How many of these blocks a process finds that takes over what this one leaves when it is killed now. */
function survivors(harness: EngineHarness, ids: readonly string[]): number {
  const wanted = new Set<string>(ids);
  const next = new EngineHarness({ ...harness.options, ...harness.legacy });
  return [...next.cache.residency.index.blocks()].filter(({ id }) => wanted.has(id)).length;
}

function forget(harness: EngineHarness, ids: readonly string[]): void {
  harness.engine.forget(ids);
  const { deletions } = harness.cache;
  for (let turns = 0; !harness.cache.isErased(deletions); turns++) {
    expect(turns, "erases end").toBeLessThan(1000);
    harness.turn();
  }
}

test("a sequence that ends while it is preempted says which blocks it leaves", () => {
  const harness = new EngineHarness({ gpuBlocks: 12, maxModelLen: 88, maxSequences: 2 });
  const ids = [1, 2].map((seed) => harness.submit(prompt(40, seed), { maxTokens: 40, sampling: ENDLESS }));
  while (harness.engine.stats().preemptions === 0) harness.turn();
  harness.engine.abort(ids[1]!, null, "abort");
  harness.runToEnd();
  for (const id of ids) harness.engine.forget(harness.answer(id).finish!.blockIds);
  expect(blockCount(harness)).toBe(0);
});

test("with the blocks of a prompt goes all that continues them, so that little must be known of a turn", () => {
  const harness = new EngineHarness();
  harness.submit(prompt(40), { maxTokens: 30, sampling: ENDLESS, isHeld: true });
  harness.runToEnd();
  expect(blockCount(harness)).toBeGreaterThan(7);
  expect(harness.announced.length).toBe(5);
  harness.engine.forget(harness.announced);
  expect(blockCount(harness)).toBe(0);
});

test("also where a block between them is lost", () => {
  const harness = new EngineHarness();
  harness.submit(prompt(40), { maxTokens: 30, sampling: ENDLESS, isHeld: true });
  harness.runToEnd();
  const { residency } = harness.cache;
  const last = [...residency.index.blocks()].find(({ id }) => id === harness.announced.at(-1))!;
  residency.drop(last, "corrupt", harness.nowMs);
  harness.engine.forget(harness.announced);
  expect(blockCount(harness)).toBe(0);
});

test("blocks are announced before they are computed, once for a choice, and only where they are held", () => {
  const harness = new EngineHarness();
  harness.submit(prompt(40), { maxTokens: 5, sampling: ENDLESS, isHeld: true });
  harness.step(); // the device does not move
  expect(harness.announced.length).toBe(5);
  harness.runToEnd();
  expect(harness.announced.length).toBe(5);
  harness.submit(prompt(40, 2), { maxTokens: 5, sampling: ENDLESS });
  harness.runToEnd();
  expect(harness.announced.length).toBe(5);
});

test("KV that led to logits that are not finite serves nobody again, nor what was cached of it", () => {
  const harness = new EngineHarness();
  ask(harness, prompt(40));
  harness.runner.failsNextSample = true;
  const id = harness.submit([...prompt(40), 3, 4], { maxTokens: 4, sampling: ENDLESS });
  harness.runToEnd();
  expect(harness.fails.get(id)!.code).toBe("internal");
  const { usage, missReasons } = ask(harness, [...prompt(40), 3, 4]);
  expect(usage.cachedTokens.gpu).toBe(0);
  expect(missReasons["corrupt"]).toBe(40);
  harness.expectNothingLeft();
});

test("when the disk has forgotten, no process meets the blocks again", () => {
  const harness = crowded({ hostSlots: 32 });
  const { blockIds } = ask(harness, prompt(40));
  harness.settle(IDLE_MS);
  expect(survivors(harness, blockIds)).toBeGreaterThan(4);
  forget(harness, blockIds);
  expect(survivors(harness, blockIds)).toBe(0);
});

test("nor those that were being written when they were deleted", () => {
  const harness = crowded({ hostSlots: 32 });
  const { blockIds } = ask(harness, prompt(40));
  const disk = harness.cache.residency.tiers.disk!;
  while (disk.writingCount === 0) harness.turn();
  harness.engine.forget(blockIds);
  expect(harness.cache.isErased(harness.cache.deletions)).toBe(false);
  forget(harness, blockIds);
  expect(survivors(harness, blockIds)).toBe(0);
});

test("what others delete meanwhile holds up nobody's answer", () => {
  const harness = crowded({ hostSlots: 100, diskSlots: 200 });
  const [first, ...others] = Array.from({ length: 30 }, (_, seed) => ask(harness, prompt(16, seed)).blockIds);
  harness.settle(10 * IDLE_MS);
  harness.engine.forget(first!);
  const { deletions } = harness.cache;
  for (const ids of others) {
    harness.engine.forget(ids);
    if (harness.cache.isErased(deletions)) break;
    harness.turn();
  }
  expect(harness.cache.isErased(deletions)).toBe(true);
  expect(harness.cache.isErased(harness.cache.deletions)).toBe(false);
});

test("an engine at rest goes on looking at operations that were given up", () => {
  const harness = crowded({ hostSlots: 32 });
  ask(harness, prompt(40));
  harness.disk!.faults = { ...NO_FAULTS, hang: 1 };
  const disk = harness.cache.residency.tiers.disk!;
  while (!disk.hasAbandoned) {
    harness.nowMs += 10;
    harness.turn();
  }
  harness.disk!.faults = NO_FAULTS;
  expect(harness.engine.hasBackgroundWork).toBe(true);
  harness.disk!.release();
  for (let turns = 0; turns < 1000 && harness.engine.hasBackgroundWork; turns++) harness.turn();
  expect<boolean>(disk.hasAbandoned).toBe(false);
  expect(harness.engine.hasBackgroundWork).toBe(false);
});

test("a block that could not be read is deleted like any other", () => {
  const harness = crowded();
  const first = ask(harness, prompt(40));
  harness.settle(IDLE_MS);
  for (const seed of [2, 3, 4]) {
    ask(harness, prompt(50, seed));
    harness.settle(IDLE_MS);
  }
  const readsFail: DiskFaults = { ...NO_FAULTS, io: 1 };
  harness.disk!.faults = readsFail;
  const again = ask(harness, [...first.tokens, 5]);
  expect(harness.cache.residency.counters.quarantinedSlots).toBeGreaterThan(0);
  harness.disk!.faults = NO_FAULTS;
  harness.nowMs += PAUSE_MS;
  harness.settle(IDLE_MS);
  const ids = [...first.blockIds, ...again.blockIds];
  forget(harness, ids);
  harness.settle();
  expect(survivors(harness, ids)).toBe(0);
});

test("an erase that failed is tried again, and its slot is used again", () => {
  const harness = crowded({ hostSlots: 32 });
  const { blockIds } = ask(harness, prompt(40));
  harness.settle(IDLE_MS);
  const disk = harness.cache.residency.tiers.disk!;
  const before = disk.pool.freeCount;
  harness.disk!.faults = { ...NO_FAULTS, io: 1 };
  forget(harness, blockIds);
  expect(disk.hasUnerased).toBe(true);
  harness.disk!.faults = NO_FAULTS;
  // The disk is left alone by then, but the engine's loop must not fall asleep for good.
  expect(harness.engine.hasBackgroundWork).toBe(true);
  harness.nowMs += PAUSE_MS;
  expect(harness.engine.hasBackgroundWork).toBe(true);
  harness.turn();
  harness.settle();
  expect(disk.hasUnerased).toBe(false);
  expect(disk.pool.freeCount).toBeGreaterThan(before + 4);
  expect(survivors(harness, blockIds)).toBe(0);
});
