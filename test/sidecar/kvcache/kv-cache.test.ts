// The cache against memory that knows what it holds: whatever open() calls cached must hold exactly the KV of that
// very prefix, after any history.

import { describe, expect, test } from "bun:test";
import { checksumsPerTurn } from "../../../sidecar/kvcache/background.ts";
import { type BlockHasher, sha256Hasher } from "../../../sidecar/kvcache/block-hash.ts";
import { cacheStats } from "../../../sidecar/kvcache/cache-stats.ts";
import { KvCache } from "../../../sidecar/kvcache/kv-cache.ts";
import type { BlockTable } from "../../../sidecar/kvcache/opened-sequence.ts";
import { FakeDevice } from "../../support/fake-device.ts";
import { kvOf } from "../../support/fake-runner.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const SALTS = [new Uint8Array(32), new Uint8Array(32).fill(1)];
const LAYER = 0;
/** No window is ever full here. */
const MAX_TOKENS = 4096;

/** A sequence as the engine would run it. */
interface Run {
  readonly table: BlockTable;
  readonly tokens: number[];
  readonly cachedCount: number;
  computed: number;
}

class Fixture {
  readonly device: FakeDevice;
  readonly cache: KvCache;
  #nowMs = 0;

  constructor(gpuBlocks: number, blockTokens = 4, hasher: BlockHasher = sha256Hasher) {
    this.device = new FakeDevice({ blockCount: gpuBlocks, blockTokens, layers: 1 });
    this.cache = new KvCache(this.device, {
      blockTokens,
      blockBytes: this.device.slotBytes,
      layers: 1,
      gpuBlocks,
      fingerprint: "test",
      maxTokens: MAX_TOKENS,
      keepBlocks: 1,
      truncationRatio: 0.5,
      policy: "scheduler-aware",
      windowBlocks: 0,
      isExclusive: false,
      recompute: "never",
      preloadLayers: null,
      maxLoadStallMs: 1,
      background: {
        admission: "idle",
        idleMs: 1,
        hostMarks: { lowBlocks: 0, highBlocks: 0 },
        gpuMarks: { lowBlocks: 0, highBlocks: 0 },
        maxReads: 1,
        maxWrites: 1,
      },
      hasher,
    });
  }

  get nowMs(): number {
    return ++this.#nowMs;
  }

  get stats(): Record<string, number> {
    return cacheStats(this.cache);
  }

  /** Null when it does not fit. */
  open(tokens: readonly number[], salt = 0): Run | null {
    const limit = tokens.length - 1;
    const prompt = this.cache.enqueue({ chain: this.cache.chain(SALTS[salt]!), tokens, limit, keep: {} });
    const opened = this.cache.open(prompt, tokens.length, { nowMs: this.nowMs, isShared: false });
    if (opened === "no-room") {
      this.cache.dequeue(prompt);
      return null;
    }
    if (opened === "reading") throw new Error("there is no disk");
    const { table, length } = opened;
    expect(this.cache.extend(table, tokens.length, this.nowMs), "what fits can be extended").toBe("extended");
    expect(length).toBeLessThanOrEqual(limit);
    expect(opened.cached).toEqual({ gpu: length, host: 0, disk: 0 });
    this.device.drain();
    this.expectContent(table, tokens, length);
    return { table, tokens: [...tokens], cachedCount: length, computed: length };
  }

  compute(run: Run, end = run.tokens.length): void {
    for (; run.computed < end; run.computed++) {
      const { blocks } = run.table;
      const before = run.computed === 0 ? 0 : this.device.read(blocks, LAYER, run.computed - 1);
      const value = kvOf(before, run.tokens[run.computed]!, run.computed, LAYER);
      this.device.write(blocks, LAYER, run.computed, value);
    }
    this.cache.commit(run.table, run.tokens, run.computed, this.nowMs);
  }

  close(run: Run): void {
    this.expectContent(run.table, run.tokens, run.computed);
    this.cache.close(run.table, run.tokens, run.computed, this.nowMs);
  }

  /** Opens, computes and closes. Returns how many tokens were cached. */
  visit(tokens: readonly number[], salt = 0): number {
    const run = this.open(tokens, salt)!;
    this.compute(run);
    this.close(run);
    this.cache.checkInvariants();
    return run.cachedCount;
  }

  expectContent(table: BlockTable, tokens: readonly number[], count: number): void {
    const expected: number[] = [];
    for (let i = 0; i < count; i++) expected.push(kvOf(expected.at(-1) ?? 0, tokens[i]!, i, LAYER));
    expect(expected.map((_, i) => this.device.read(table.blocks, LAYER, i))).toEqual(expected);
  }
}

function range(length: number, first = 1): number[] {
  return Array.from({ length }, (_, i) => first + i);
}

test("a turn of the background sums up two host slots, one where slots are large", () => {
  const mebibytes = [0.4, 8, 9, 16, 52];
  expect(mebibytes.map((size) => checksumsPerTurn(size * 2 ** 20))).toEqual([2, 2, 1, 1, 1]);
});

describe("KvCache", () => {
  test("a second visit finds everything but the last token", () => {
    const fixture = new Fixture(16);
    expect(fixture.visit(range(11))).toBe(0);
    expect(fixture.visit(range(11))).toBe(10);
    expect(fixture.visit(range(12))).toBe(11);
    expect(fixture.cache.availableBlocks).toBe(16);
  });

  test("finds the common prefix to the token, inside a block that another conversation went on with", () => {
    const fixture = new Fixture(16);
    fixture.visit(range(20));
    expect(fixture.visit([...range(10), 99, 98, 97])).toBe(10);
    expect(fixture.stats.copiedBlocks).toBe(1);
  });

  test("two accounts never share", () => {
    const fixture = new Fixture(16);
    fixture.visit(range(20), 0);
    expect(fixture.visit(range(20), 1)).toBe(0);
    expect(fixture.visit(range(20), 1)).toBe(19);
  });

  test("an open block is continued in place when nobody uses it, on a copy when somebody does", () => {
    const fixture = new Fixture(16);
    fixture.visit(range(6));
    const first = fixture.open(range(9))!;
    expect(fixture.stats.copiedBlocks).toBe(0);
    const second = fixture.open([...range(6), 50, 51, 52])!;
    expect(second.cachedCount).toBe(6);
    expect(fixture.stats.copiedBlocks).toBe(1);
    fixture.compute(first);
    fixture.compute(second);
    fixture.close(first);
    fixture.close(second);
    fixture.cache.checkInvariants();
  });

  test("the prefix of a running sequence is shared while it runs on", () => {
    const fixture = new Fixture(16);
    const running = fixture.open(range(10))!;
    fixture.compute(running);
    fixture.cache.commitOpen(running.table, running.tokens, running.computed, fixture.nowMs);
    const other = fixture.open(range(10))!;
    expect(other.cachedCount).toBe(9);
    running.tokens.push(77, 78, 79, 80);
    expect(fixture.cache.extend(running.table, 14, fixture.nowMs)).toBe("extended");
    fixture.compute(running);
    fixture.compute(other);
    fixture.close(other);
    fixture.close(running);
    expect(fixture.visit([...range(10), 77, 78, 79, 80, 81])).toBe(14);
  });

  test("extend takes nothing when there is not enough", () => {
    const fixture = new Fixture(4);
    const run = fixture.open(range(9))!;
    expect(fixture.cache.extend(run.table, 17, fixture.nowMs)).toBe("no-room");
    expect(run.table.blocks.length).toBe(3);
    expect(fixture.cache.availableBlocks).toBe(1);
    expect(fixture.open(range(9, 100))).toBe(null);
    fixture.close(run);
  });

  test("the last block of a conversation is evicted before its first", () => {
    const fixture = new Fixture(6);
    fixture.visit(range(16));
    fixture.visit(range(14, 100));
    // Two of the four blocks had to go.
    expect(fixture.visit(range(16))).toBe(8);
  });

  test("a sequence as large as the pool opens on its own cached blocks", () => {
    const fixture = new Fixture(4);
    fixture.visit(range(16));
    expect(fixture.visit(range(16))).toBeGreaterThanOrEqual(12);
    expect(fixture.cache.availableBlocks).toBe(4);
  });

  test("a collision of ids under one parent is a miss, and the content is right", () => {
    // All blocks with the same parent collide; roots stay apart.
    const blunt: BlockHasher = (parts) => sha256Hasher(parts.length === 2 ? [parts[0]!] : parts);
    const fixture = new Fixture(16, 4, blunt);
    fixture.visit([1, 2, 3, 4, 5]);
    expect(fixture.visit([9, 8, 7, 6, 5])).toBe(0);
    expect(fixture.visit([1, 2, 3, 4, 5])).toBe(4);
  });

  test("counts what was asked for and what was found", () => {
    const fixture = new Fixture(8);
    fixture.visit(range(9));
    fixture.visit(range(9));
    expect(fixture.stats).toMatchObject({ queriedTokens: 16, hitTokens: 8, gpuBlocksAvailable: 8 });
  });
});

describe("KvCache under random use", () => {
  const seed = testSeed();

  /** Prompts of few different tokens, many of which begin alike. */
  function randomPrompt(random: SeededRandom, known: readonly number[][]): number[] {
    const stem = known.length > 0 && random.next() < 0.7 ? known[random.integer(0, known.length - 1)]! : [];
    const kept = stem.slice(0, random.integer(0, stem.length));
    const added = Array.from({ length: random.integer(1, 9) }, () => random.integer(1, 3));
    return [...kept, ...added].slice(0, 28);
  }

  test(`what is called cached holds the prefix's own KV (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    let hits = 0;
    for (let round = 0; round < 40; round++) {
      const blockTokens = 2 ** random.integer(0, 3);
      const fixture = new Fixture(Math.ceil(40 / blockTokens) + random.integer(0, 20), blockTokens);
      const runs: Run[] = [];
      const known: number[][] = [];
      for (let i = 0; i < 150; i++) {
        const run = runs[random.integer(0, Math.max(0, runs.length - 1))];
        const pick = random.next();
        if (pick < 0.35 || run === undefined) {
          const tokens = randomPrompt(random, known);
          const opened = fixture.open(tokens, random.next() < 0.8 ? 0 : 1);
          if (opened !== null) runs.push(opened);
          known.push(tokens);
          hits += opened?.cachedCount ?? 0;
        } else if (pick < 0.5) {
          fixture.compute(run, random.integer(run.computed, run.tokens.length));
        } else if (pick < 0.7) {
          const hasRoom = run.tokens.length < 36 &&
            fixture.cache.extend(run.table, run.tokens.length + 1, fixture.nowMs) === "extended";
          if (hasRoom) {
            run.tokens.push(random.integer(1, 3));
          }
        } else if (pick < 0.8) {
          fixture.cache.commitOpen(run.table, run.tokens, run.computed, fixture.nowMs);
        } else {
          known.push([...run.tokens]);
          fixture.close(run);
          runs.splice(runs.indexOf(run), 1);
        }
        fixture.cache.checkInvariants();
      }
      for (const run of runs) fixture.close(run);
      expect(fixture.cache.availableBlocks).toBe(fixture.cache.blockCount);
      fixture.cache.checkInvariants();
    }
    expect(hits).toBeGreaterThan(1000);
  });

  test(`fits() keeps its word in a full pool (seed ${seed})`, () => {
    const random = new SeededRandom(seed + 1);
    const fixture = new Fixture(9, 2);
    const known: number[][] = [];
    let refused = 0;
    for (let i = 0; i < 400; i++) {
      const runs = Array.from({ length: random.integer(1, 4) }, () => {
        const tokens = randomPrompt(random, known).slice(0, 16);
        known.push(tokens);
        return fixture.open(tokens);
      });
      for (const run of runs) {
        if (run === null) refused++;
        else {
          fixture.compute(run);
          fixture.close(run);
        }
      }
      fixture.cache.checkInvariants();
    }
    expect(refused).toBeGreaterThan(10);
  });
});
