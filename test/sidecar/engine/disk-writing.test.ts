// What goes to disk by itself, what an orderly stop still writes, and what a disk that fails costs: on a fake device
// and a disk whose faults are chosen.

import { describe, expect, test } from "bun:test";
import { EngineHarness } from "../../support/engine-harness.ts";
import { NO_FAULTS } from "../../support/faulty-disk.ts";
import { ask, prompt } from "../../support/harness-turns.ts";

const INCLUSIVE = { isExclusive: false };
const NEVER_MS = 1e9;
const IDLE_MS = 500;
/** Far more than all that is to be written takes. */
const FLUSH_TURNS_MAX = 3000;

/** An orderly stop; returns its turns. */
function flush(harness: EngineHarness): number {
  let turns = 0;
  while (harness.cache.flush(++harness.nowMs) && ++turns < FLUSH_TURNS_MAX) harness.device.drain();
  return turns;
}

describe("second-touch admission", () => {
  function roomy(): EngineHarness {
    return new EngineHarness({
      gpuBlocks: 200, hostSlots: 200, diskSlots: 200, maxSequences: 2, background: { admission: "second-touch" },
    });
  }

  test("what was used again goes to disk, however much lies there that was not", () => {
    const harness = roomy();
    for (let seed = 10; seed < 16; seed++) ask(harness, prompt(60, seed));
    let tokens: readonly number[] = prompt(60);
    for (let i = 0; i < 4; i++) tokens = [...ask(harness, tokens).tokens, 3];
    harness.settle(IDLE_MS);
    const { dirty, counters } = harness.cache.residency;
    expect(dirty.wantedCount).toBe(0);
    expect(counters.writtenBlocks).toBeGreaterThan(7);
    expect(dirty.size).toBeGreaterThan(32);
  });

  test("with nothing that was used again there is nothing to do", () => {
    const harness = roomy();
    ask(harness, prompt(60));
    harness.settle(IDLE_MS);
    expect(harness.cache.isBusy(harness.nowMs)).toBe(false);
  });

  test("an orderly stop writes all of it", () => {
    const harness = roomy();
    ask(harness, prompt(60));
    harness.settle();
    flush(harness);
    expect(harness.cache.residency.dirty.size).toBe(0);
    expect(harness.cache.residency.counters.writtenBlocks).toBeGreaterThan(7);
  });
});

describe("an orderly stop", () => {
  test("writes what host memory holds, whatever lies on the gpu alone, and then that", () => {
    const harness = new EngineHarness({
      gpuBlocks: 120, hostSlots: 30, diskSlots: 300, maxModelLen: 1024, cache: INCLUSIVE,
      background: { idleMs: NEVER_MS },
    });
    const { tokens } = ask(harness, prompt(200, 2));
    harness.settle(20);
    ask(harness, prompt(600), 6, { keep: { priority: 5 } });
    harness.settle(20);
    ask(harness, [...tokens, 5]);
    harness.settle(20);
    expect(harness.cache.residency.dirty.size).toBeGreaterThan(80);
    flush(harness);
    expect(harness.cache.residency.dirty.size).toBe(0);
  });

  test("does not wait for an operation that was given up", () => {
    const harness = new EngineHarness({ gpuBlocks: 20, hostSlots: 30, diskSlots: 60, cache: INCLUSIVE });
    ask(harness, prompt(100));
    harness.disk!.faults = { ...NO_FAULTS, hang: 1 };
    for (let i = 0; i < 8; i++) harness.turn();
    harness.disk!.faults = NO_FAULTS;
    for (let i = 0; i < 600; i++) harness.turn();
    expect(harness.cache.residency.tiers.disk!.store.operationCount).toBeGreaterThan(0);
    expect(flush(harness)).toBeLessThan(FLUSH_TURNS_MAX);
    expect(harness.cache.residency.dirty.size).toBe(0);
  });
});

describe("a disk that does not take what it is given", () => {
  function fillHost(harness: EngineHarness): void {
    for (const seed of [1, 2, 3, 4]) {
      ask(harness, prompt(50, seed));
      harness.settle(20);
    }
  }
  const options = {
    gpuBlocks: 9, maxModelLen: 64, hostSlots: 20, diskSlots: 64, cache: INCLUSIVE,
    background: { idleMs: NEVER_MS, maxWrites: 1, hostMarks: { lowBlocks: 4, highBlocks: 6 } },
  };

  test("for a moment: host memory keeps it until it is written", () => {
    const harness = new EngineHarness(options);
    harness.disk!.faults = { ...NO_FAULTS, noSpace: 1 };
    harness.onTurn = () => {
      if (harness.cache.residency.tiers.disk!.failureCount > 0) harness.disk!.faults = NO_FAULTS;
    };
    fillHost(harness);
    const { counters, lost } = harness.cache.residency;
    expect(harness.cache.residency.tiers.disk!.failureCount).toBeWithin(1, 4);
    expect(counters.writtenBlocks).toBeGreaterThan(0);
    expect(lost.counts.get("evicted") ?? 0).toBe(0);
    harness.expectNothingLeft();
  });

  test("for long: host memory is the last tier, and takes what is new", () => {
    const harness = new EngineHarness(options);
    harness.disk!.faults = { ...NO_FAULTS, noSpace: 1 };
    fillHost(harness);
    const { counters, lost } = harness.cache.residency;
    expect(counters.writtenBlocks).toBe(0);
    expect(lost.counts.get("evicted")).toBeGreaterThan(0);
    ask(harness, prompt(50, 5));
    harness.settle(20);
    for (const seed of [6, 7]) ask(harness, prompt(50, seed));
    harness.settle(20);
    const { usage } = ask(harness, [...prompt(50, 7), 1]);
    expect(usage.cachedTokens.gpu + usage.cachedTokens.host).toBeGreaterThanOrEqual(48);
    harness.expectNothingLeft();
  });
});
