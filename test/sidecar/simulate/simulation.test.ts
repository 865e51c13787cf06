// Whole runs of the simulator: what must hold for any workload, and what the paper promises for an
// overloaded one.

import { describe, expect, test } from "bun:test";
import { POLICY_NAMES, type PolicyName } from "../../../sidecar/kvcache/policy.ts";
import type { Measured } from "../../../sidecar/simulate/measurements.ts";
import { Simulation, type SimulationConfig } from "../../../sidecar/simulate/simulation.ts";
import type { Session, Turn } from "../../../sidecar/simulate/trace.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const BASE: Omit<SimulationConfig, "sessions" | "sessionCount" | "policy"> = {
  blockTokens: 8,
  blockBytes: 8000,
  gpuBlocks: 0,
  hostBlocks: 40,
  diskBlocks: 200,
  diskReadRate: 1e6,
  diskWriteRate: 1e6,
  lowWatermark: 0.1,
  highWatermark: 0.2,
  ttlMs: Infinity,
  batch: 2,
  prefillRate: 1000,
  decodeRate: 20,
  pcieRate: 1e7,
  contextTokens: 256,
  truncationRatio: 0.5,
  truncationKeepBlocks: 0,
  sessionRate: 2,
  timeScale: 1,
  thinkMs: 1000,
  warmupTurns: 0,
  seed: 1,
};

function turn(newTokens: number, outputTokens: number, arrivalMs: number | null = null): Turn {
  return { arrivalMs, keptTokens: null, newTokens, outputTokens };
}

function randomSessions(random: SeededRandom, count: number): Session[] {
  return Array.from({ length: count }, () =>
    Array.from({ length: random.integer(1, 8) }, () => turn(random.integer(1, 60), random.integer(1, 40))),
  );
}

function run(
  sessions: readonly Session[],
  policy: PolicyName,
  changes: Partial<SimulationConfig> = {},
): Measured {
  const config = { ...BASE, sessions, sessionCount: sessions.length, policy, ...changes };
  return new Simulation(config).run();
}

describe("any workload", () => {
  const seed = testSeed();
  const variants: readonly (readonly [name: string, changes: Partial<SimulationConfig>])[] = [
    ["plain", {}],
    ["a gpu tier", { gpuBlocks: 30 }],
    ["tiny tiers", { hostBlocks: 4, diskBlocks: 5 }],
    ["no disk", { diskBlocks: 0 }],
    ["no host memory", { hostBlocks: 0 }],
    ["a slow disk", { diskReadRate: 1e4, diskWriteRate: 1e4 }],
    ["idle times", { ttlMs: 3000 }],
    ["an endless context", { contextTokens: 0 }],
    ["a kept first block", { contextTokens: 96, truncationKeepBlocks: 1 }],
  ];
  for (const policy of POLICY_NAMES) {
    const name = `${policy}, %s: tokens add up, nothing beats the optimum (SEED=${seed})`;
    test.each(variants)(name, (_, changes) => {
      const sessions = randomSessions(new SeededRandom(seed), 60);
      const result = run(sessions, policy, changes);
      const { gpu, host, disk } = result.hitTokens;
      const turns = sessions.flat();
      expect(result.turns).toBe(turns.length);
      expect(result.turnsWithHistory).toBeLessThanOrEqual(turns.length - sessions.length);
      expect(gpu + host + disk + result.computedTokens).toBe(result.promptTokens);
      expect(gpu + host + disk).toBeLessThanOrEqual(result.historyTokens);
      expect(result.hitBlocks).toBeLessThanOrEqual(result.optimum.hitBlocks);
      const decodedTokens = turns.reduce((sum, { outputTokens }) => sum + outputTokens - 1, 0);
      const fullBatchMs = (1000 * decodedTokens) / (BASE.decodeRate * BASE.batch);
      expect(result.decodeMs).toBeGreaterThanOrEqual(fullBatchMs - 1e-3);
      expect(result.bytes.diskReadOnDemand).toBeLessThanOrEqual(result.bytes.diskRead);
    });
  }

  test("the same seed gives the same result, another seed another one", () => {
    const sessions = randomSessions(new SeededRandom(7), 40);
    for (const policy of POLICY_NAMES) {
      const first = run(sessions, policy, { seed: 3 });
      expect(run(sessions, policy, { seed: 3 })).toEqual(first);
      expect(run(sessions, policy, { seed: 4 }).makespanMs).not.toBe(first.makespanMs);
    }
  });
});

describe("tiers that hold everything", () => {
  test("every turn with history hits, whatever the policy", () => {
    const sessions = randomSessions(new SeededRandom(5), 40);
    for (const policy of POLICY_NAMES) {
      const { hitRate, optimumHitRate } = run(sessions, policy, { hostBlocks: 5000, diskBlocks: 5000 });
      expect(hitRate.turnsWithHistory).toBe(1);
      expect(hitRate.inMemory).toBe(1);
      expect(optimumHitRate.turnsWithHistory).toBe(1);
    }
  });

  test("without overlap of turns a gpu tier serves what was just computed", () => {
    const sessions = [[turn(20, 5), turn(20, 5), turn(20, 5)]];
    const { hitTokens, hostToGpuBytes } = run(sessions, "lru", { gpuBlocks: 100 });
    expect(hitTokens).toEqual({ gpu: 25 + 50, host: 0, disk: 0 });
    expect(hostToGpuBytes).toBe(0);
  });
});

describe("an overloaded service", () => {
  // All sessions talk at once: while one turn runs, the others wait, and their KV is far more than host
  // memory.
  const sessions: Session[] = Array.from({ length: 60 }, () => Array.from({ length: 6 }, () => turn(30, 20)));
  const overloaded: Partial<SimulationConfig> = {
    sessionRate: 100,
    thinkMs: 100,
    hostBlocks: 120,
    diskBlocks: 600,
  };

  test("scheduler-aware finds in memory what lru and fifo must fetch from disk", () => {
    const [aware, lru, fifo] = POLICY_NAMES.map((policy) => run(sessions, policy, overloaded));
    expect(aware!.queue.maxBytes).toBeGreaterThan(5 * 120 * 8000);
    expect(aware!.hitRate.inMemory).toBeGreaterThan(0.9);
    expect(lru!.hitRate.inMemory).toBeLessThan(0.1);
    expect(fifo!.hitRate.inMemory).toBeLessThan(0.1);
  });

  test("with a queue beyond all tiers lru evicts what is needed next, scheduler-aware does not", () => {
    const [aware, lru] = POLICY_NAMES.map((policy) => run(sessions, policy, overloaded));
    expect(aware!.queue.maxBytes).toBeGreaterThan((120 + 600) * 8000);
    expect(aware!.hitRate.tokens).toBeGreaterThan(0.3);
    expect(lru!.hitRate.tokens).toBeLessThan(0.1);
  });

  test("among passers-by, old conversations: scheduler-aware above lru, lru above fifo", () => {
    const mixed = Array.from({ length: 200 }, (_, i) =>
      Array.from({ length: i % 5 === 0 ? 10 : 1 }, () => turn(30, 20)),
    );
    const [aware, lru, fifo] = POLICY_NAMES.map(
      (policy) => run(mixed, policy, { thinkMs: 100, diskBlocks: 400 }).hitRate.tokens,
    );
    expect(aware!).toBeGreaterThan(lru! + 0.05);
    expect(lru!).toBeGreaterThan(fifo! + 0.05);
  });

  test("without a queue, scheduler-aware is lru", () => {
    const idle: Partial<SimulationConfig> = { sessionRate: 0.01, batch: 100, thinkMs: 60_000 };
    const [aware, lru] = POLICY_NAMES.map((policy) => run(sessions, policy, idle));
    expect(aware!.hitTokens).toEqual(lru!.hitTokens);
    expect(aware!.queue.maxTurns).toBe(1);
  });
});

describe("a turn", () => {
  const alone: Partial<SimulationConfig> = { sessionRate: null, batch: 1 };

  test("takes prefill, then one decode step for each further token", () => {
    const session = [turn(100, 21, 500)];
    const { ttftMs, makespanMs, prefillMs, decodeMs } = run([session], "lru", alone);
    expect(ttftMs.mean).toBeCloseTo(100);
    expect([prefillMs, decodeMs]).toEqual([100, 1000]);
    expect(makespanMs).toBeCloseTo(500 + 100 + 1000);
  });

  test("never arrives before the answer that it replies to", () => {
    const impatient = [0, 1].map((arrivalMs) => turn(10, 1, arrivalMs));
    const { ttftMs, makespanMs } = run([impatient], "lru", alone);
    expect(makespanMs).toBeCloseTo(20);
    expect(ttftMs.p95).toBeCloseTo(10);
  });

  test("computes again what an edit took away", () => {
    const edited = [
      turn(20, 4, 0),
      { ...turn(5, 1, 9000), keptTokens: 10 },
    ];
    const { hitTokens, computedTokens } = run([edited], "lru", alone);
    expect(hitTokens.host).toBe(10);
    expect(computedTokens).toBe(25);
  });

  test("reads from disk what others pushed out of host memory", () => {
    const pushers = Array.from({ length: 20 }, () => [turn(40, 1, 1000)]);
    const returning = [0, 60_000].map((arrivalMs) => turn(64, 1, arrivalMs));
    const { hitTokens, bytes } = run([returning, ...pushers], "scheduler-aware", alone);
    expect(hitTokens).toEqual({ gpu: 0, host: 0, disk: 65 });
    expect(bytes.diskReadOnDemand).toBe(9 * 8000);
  });
});
