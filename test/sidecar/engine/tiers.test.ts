// The engine over all tiers, on a fake device whose every answer depends on every byte of KV and on the order in which
// its streams did their work: wherever a conversation's blocks have been meanwhile, its next turn is answered as if
// nothing had ever been cached.

import { describe, expect, test } from "bun:test";
import { type BlockHasher, sha256Hasher } from "../../../sidecar/kvcache/block-hash.ts";
import { EngineHarness, type HarnessOptions } from "../../support/engine-harness.ts";
import { NO_FAULTS } from "../../support/faulty-disk.ts";
import { ask, ENDLESS, prompt } from "../../support/harness-turns.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const IDLE_MS = 20;

/** A gpu tier that two conversations cannot share: the first is pushed out by the second. */
function crowded(options: HarnessOptions = {}): EngineHarness {
  return new EngineHarness({ gpuBlocks: 9, maxModelLen: 64, hostSlots: 32, diskSlots: 64, ...options });
}

/** What a process left in host memory, a bit of its first block flipped, and the conversation that lies there. */
function rottenSurvivor(): { first: readonly number[]; survivor: NonNullable<HarnessOptions["survivor"]> } {
  const harness = crowded({ cache: { isExclusive: false } });
  const first = [...ask(harness, prompt(40)).tokens];
  harness.settle();
  for (let i = 0; i < 20; i++) harness.turn();
  const survivor = harness.legacy.survivor!;
  expect(survivor.headers.some((byte) => byte !== 0)).toBe(true);
  survivor.slots[3]! ^= 4;
  return { first, survivor };
}

describe.each([
  ["inclusive", false],
  ["exclusive", true],
] as const)("%s tiers", (_, isExclusive) => {
  const cache = { isExclusive };

  test("what left the gpu is served from host memory", () => {
    const harness = crowded({ diskSlots: 0, cache });
    const first = ask(harness, prompt(40)).tokens;
    harness.settle();
    for (const seed of [2, 3]) ask(harness, prompt(50, seed));
    harness.settle();
    const { usage, cache: report } = ask(harness, [...first, 5]);
    expect(usage.cachedTokens.host).toBeGreaterThanOrEqual(40);
    expect(report).toMatchObject({ choice: "load" });
    expect(report.loadedBytes).toBeGreaterThan(0);
    harness.expectNothingLeft();
  });

  test("a layer is saved when it was computed, however far the save stream is ahead of the others", () => {
    const harness = crowded({ layers: 20, diskSlots: 0, cache });
    harness.submit(prompt(40), { maxTokens: 1, sampling: ENDLESS });
    const { device } = harness;
    harness.runToEnd(() => {
      harness.step();
      while (device.advance("save") || device.advance("compute"));
    });
    harness.settle();
    for (const seed of [2, 3]) ask(harness, prompt(50, seed));
    harness.settle();
    const { usage } = ask(harness, [...prompt(40), 5]);
    expect(usage.cachedTokens.host).toBeGreaterThanOrEqual(39);
    harness.expectNothingLeft();
  });

  test("a long answer takes nothing from others for which host memory has room", () => {
    const gpuMarks = { lowBlocks: 0, highBlocks: 0 }; // nothing is moved down before it is in the way
    const harness = crowded({ diskSlots: 0, cache, background: { gpuMarks } });
    const first = ask(harness, prompt(40)).tokens;
    ask(harness, prompt(8, 2), 55);
    const { usage } = ask(harness, [...first, 5]);
    expect(usage.cachedTokens.gpu + usage.cachedTokens.host).toBeGreaterThanOrEqual(first.length - 1);
    expect(harness.cache.residency.lost.counts.get("evicted") ?? 0).toBe(0);
    harness.expectNothingLeft();
  });

  test("with second-touch admission nothing that came once is moved, however short the idle time", () => {
    const background = { admission: "second-touch", idleMs: 0 } as const;
    const harness = crowded({ hostSlots: 4, cache, background });
    ask(harness, prompt(40));
    harness.settle(IDLE_MS);
    expect(harness.cache.residency.counters.writtenBlocks).toBe(0);
    const { savedBlocks } = harness.cache.residency.counters;
    harness.settle(IDLE_MS);
    expect(harness.cache.residency.counters.savedBlocks).toBe(savedBlocks);
    harness.expectNothingLeft();
  });

  test("what left host memory is served from disk", () => {
    const harness = crowded({ hostSlots: 8, cache });
    const first = ask(harness, prompt(40)).tokens;
    harness.settle(IDLE_MS);
    for (let seed = 2; seed < 6; seed++) {
      ask(harness, prompt(50, seed));
      harness.settle(IDLE_MS);
    }
    const { usage } = ask(harness, [...first, 5]);
    expect(usage.cachedTokens.disk).toBeGreaterThanOrEqual(32);
    harness.expectNothingLeft();
  });

  test("a new process serves from disk what an earlier one had, and from shared memory", () => {
    const harness = crowded({ cache });
    const first = ask(harness, prompt(40)).tokens;
    harness.settle(IDLE_MS);
    const { medium, survivor } = harness.legacy;
    const fromDisk = crowded({ cache, medium: medium! });
    expect(ask(fromDisk, [...first, 5]).usage.cachedTokens.disk).toBeGreaterThanOrEqual(45);
    const fromBoth = crowded({ cache, medium: harness.legacy.medium!, survivor: survivor! });
    const { host, disk } = ask(fromBoth, [...first, 5]).usage.cachedTokens;
    expect(host + disk).toBeGreaterThanOrEqual(45);
    if (!isExclusive) expect(host).toBeGreaterThanOrEqual(45);
  });

  test("blocks of another model are never met", () => {
    const harness = crowded({ cache });
    const first = ask(harness, prompt(40)).tokens;
    harness.settle(IDLE_MS);
    const other = crowded({ cache, ...harness.legacy, fingerprint: "other" });
    const { usage, missReasons } = ask(other, [...first, 5]);
    expect(usage.cachedTokens).toEqual({ gpu: 0, host: 0, disk: 0 });
    // Its full blocks are known to have been another model's; each counts once, though host and disk both had it.
    expect(missReasons).toEqual({ fingerprint: 40, absent: 7 });
    expect(other.cache.residency.lost.counts.get("fingerprint")).toBeWithin(5, 8);
    other.expectNothingLeft();
  });

  test("and who had them is told to nobody else", () => {
    const harness = crowded({ cache });
    const first = ask(harness, prompt(40)).tokens;
    harness.settle(IDLE_MS);
    const other = crowded({ cache, ...harness.legacy, fingerprint: "other" });
    const salt = new Uint8Array(32).fill(9);
    const id = other.submit([...first, 5], { maxTokens: 1, sampling: ENDLESS, salt });
    other.runToEnd();
    expect(other.answer(id).finish!.missReasons).toEqual({ absent: 47 });
  });

  test("what is on disk is computed where host memory has no room to read it into, and that is the reason", () => {
    const earlier = crowded({ cache });
    const first = ask(earlier, prompt(40)).tokens;
    earlier.settle(IDLE_MS);
    // Nothing goes to disk of its own accord, so what fills host memory stays there.
    const background = { admission: "second-touch", hostMarks: { lowBlocks: 0, highBlocks: 0 } } as const;
    const later = crowded({ cache: { isExclusive: false }, medium: earlier.legacy.medium!, hostSlots: 6, background });
    ask(later, prompt(50, 2));
    later.settle();
    const { usage, missReasons } = ask(later, [...first, 5]);
    expect(usage.cachedTokens).toEqual({ gpu: 0, host: 0, disk: 0 });
    expect(missReasons["no_host_room"]).toBeGreaterThanOrEqual(40);
    expect(missReasons["timeout"]).toBeUndefined();
    later.expectNothingLeft();
  });

  test("a rotten host slot of an earlier process is a miss", () => {
    const { first, survivor } = rottenSurvivor();
    const next = crowded({ cache, survivor, diskSlots: 0 });
    const { usage, missReasons } = ask(next, [...first, 5]);
    expect(usage.cachedTokens.host).toBe(0);
    expect(missReasons["corrupt"]).toBe(8);
  });

  test("what an earlier process left in host memory is checked before anyone asks, and what is rotten is gone", () => {
    const { first, survivor } = rottenSurvivor();
    const next = crowded({ cache, survivor, diskSlots: 0 });
    const { host } = next.cache.residency.tiers;
    expect(host!.nextUnverified()).not.toBeNull();
    while (next.cache.isBusy(next.nowMs)) next.turn();
    expect(host!.nextUnverified()).toBeNull();
    expect(next.cache.residency.lost.counts.get("corrupt")).toBe(1);
    expect(ask(next, [...first, 5]).missReasons["corrupt"]).toBe(8);
  });

  test("a rotten disk block is a miss with its reason, its slot stays out of use", () => {
    const harness = crowded({ cache });
    const first = ask(harness, prompt(40)).tokens;
    harness.settle(IDLE_MS);
    const { medium } = harness.legacy;
    for (const page of medium!.pages()) if (page > 256) medium!.flipBit(page, 77);
    const next = crowded({ cache, medium: medium! });
    const { usage, missReasons } = ask(next, [...first, 5]);
    expect(usage.cachedTokens.disk).toBe(0);
    expect(missReasons["corrupt"]).toBeGreaterThan(0);
    expect(next.cache.residency.counters.quarantinedSlots).toBeGreaterThan(0);
  });

  test("reads that never end: the tokens are computed, and the memory is not reused before they do", () => {
    const harness = crowded({ cache });
    const first = ask(harness, prompt(40)).tokens;
    harness.settle(IDLE_MS);
    const next = crowded({ cache, ...harness.legacy });
    next.disk!.faults = { ...NO_FAULTS, hang: 1 };
    const id = next.submit([...first, 5], { maxTokens: 4, sampling: ENDLESS });
    for (let turn = 0; turn < 3000 && !next.engine.isIdle; turn++) {
      next.nowMs += 10;
      next.turn();
    }
    const expected = next.reference({ tokens: Int32Array.from([...first, 5]), maxTokens: 4, sampling: ENDLESS });
    expect(next.answer(id).tokens).toEqual(expected.tokens);
    next.disk!.faults = NO_FAULTS;
    next.disk!.release();
    next.settle();
    next.expectNothingLeft();
  });

  test("nor is it after they were given up: what comes late lands in nobody's block", () => {
    const harness = crowded({ cache });
    const first = ask(harness, prompt(40)).tokens;
    harness.settle(IDLE_MS);
    const next = crowded({ cache, medium: harness.legacy.medium!, hostSlots: 20 });
    next.disk!.faults = { ...NO_FAULTS, hang: 1 };
    const id = next.submit([...first, 5], { maxTokens: 4, sampling: ENDLESS });
    while (!next.engine.isIdle) {
      next.nowMs += 10;
      next.turn();
    }
    expect(next.answer(id).tokens.length).toBe(4);
    next.disk!.faults = NO_FAULTS;
    // Others fill all of host memory that may be had; only then the reads end.
    for (const seed of [2, 3]) ask(next, prompt(50, seed));
    next.settle();
    next.disk!.release();
    for (let i = 0; i < 50; i++) next.turn();
    next.settle();
    const { usage } = ask(next, [...prompt(50, 2), 1]);
    expect(usage.cachedTokens.host).toBeGreaterThan(0);
    for (const seed of [3, 2]) ask(next, [...prompt(50, seed), 2]);
    next.expectNothingLeft();
  });

  test("a deleted conversation is in no tier any more, nor after a restart", () => {
    const harness = crowded({ cache });
    const { tokens, blockIds } = ask(harness, prompt(40));
    harness.settle(IDLE_MS);
    const counts = harness.engine.forget(blockIds);
    expect(counts["disk"]).toBeGreaterThanOrEqual(5);
    expect((counts["gpu"] ?? 0) + (counts["host"] ?? 0)).toBeGreaterThanOrEqual(5);
    harness.settle();
    const { missReasons } = ask(harness, [...tokens, 5]);
    expect(missReasons["deleted"]).toBeGreaterThanOrEqual(32);
    harness.engine.forget(harness.answer(2).finish!.blockIds);
    harness.settle();
    const next = crowded({ cache, ...harness.legacy });
    const { gpu, host, disk } = ask(next, [...tokens, 5]).usage.cachedTokens;
    expect(gpu + host + disk).toBe(0);
  });

  test("blocks whose idle time is over go", () => {
    const harness = crowded({ cache });
    const id = harness.submit(prompt(40), { keep: { ttlMs: 100 }, maxTokens: 2, sampling: ENDLESS });
    harness.runToEnd();
    harness.settle(IDLE_MS);
    expect(harness.cache.residency.index.size).toBeGreaterThan(0);
    harness.settle(120);
    expect(harness.cache.residency.index.size).toBe(0);
    const { missReasons } = ask(harness, harness.answer(id).finish!.tokens as unknown as number[]);
    expect(missReasons["expired"]).toBe(40);
  });
});

test("what is computed again while it goes to disk goes there once, and then nothing is left to do", () => {
  const harness = crowded({ cache: { isExclusive: false }, background: { maxWrites: 64 } });
  const { disk, cache } = harness;
  disk!.faults = { ...NO_FAULTS, hang: 1 };
  ask(harness, prompt(40));
  for (const seed of [2, 3]) ask(harness, prompt(50, seed));
  for (let i = 0; i < IDLE_MS; i++) harness.turn();
  expect(cache.residency.tiers.disk!.writingCount).toBeGreaterThan(5);
  // Its last block is computed on a copy, as its last token always is.
  expect(ask(harness, prompt(40)).usage.cachedTokens).toMatchObject({ host: 39 });
  disk!.faults = NO_FAULTS;
  disk!.release();
  harness.settle(2 * IDLE_MS);
  expect(cache.residency.dirty.size).toBe(0);
  expect(cache.isBusy(harness.nowMs)).toBe(false);
  harness.expectNothingLeft();
});

test("a load into blocks that a step in flight still writes waits for it, however far its stream is ahead", () => {
  // Host memory has room for the first conversation alone: saves would hold the others' blocks.
  const background = { hostMarks: { lowBlocks: 0, highBlocks: 0 } };
  const cache = { isExclusive: false };
  const harness = crowded({ hostSlots: 6, diskSlots: 0, maxBatchTokens: 64, cache, background });
  const { tokens } = ask(harness, prompt(40));
  for (const seed of [2, 3]) ask(harness, prompt(50, seed));
  harness.settle();
  const { device, engine } = harness;
  const left = harness.submit(prompt(50, 4), { maxTokens: 9, sampling: ENDLESS });
  harness.step(); // its prompt is in flight, and the device does not move
  engine.abort(left, null, "abort");
  const id = harness.submit([...tokens, 5], { maxTokens: 6, sampling: ENDLESS });
  harness.step();
  expect(harness.cache.moves.inFlight).toBeGreaterThan(0);
  while (device.advance("load"));
  harness.runToEnd();
  const expected = harness.reference({ tokens: Int32Array.from([...tokens, 5]), maxTokens: 6, sampling: ENDLESS });
  expect(harness.answer(id).tokens).toEqual(expected.tokens);
  expect(harness.answer(id).finish!.usage.cachedTokens.host).toBeGreaterThan(30);
  harness.expectNothingLeft();
});

test("exclusive tiers: nothing is lost to a disk that is slow, however suddenly gpu memory is wanted", () => {
  const harness = crowded({ hostSlots: 8, diskSlots: 64, cache: { isExclusive: true } });
  harness.disk!.faults = { ...NO_FAULTS, hang: 1 };
  let turn = 0;
  const askSlowly = (tokens: readonly number[]) => {
    const id = harness.submit(tokens, { maxTokens: 2, sampling: ENDLESS });
    harness.runToEnd(() => {
      if (++turn % 40 === 0) harness.disk!.release();
    });
    return harness.answer(id).finish!;
  };
  const talks = [1, 2, 3, 4, 5].map((seed) => askSlowly(prompt(40, seed)).tokens);
  for (const tokens of talks) {
    const { gpu, host, disk } = askSlowly([...tokens, 5]).usage.cachedTokens;
    expect(gpu + host + disk).toBe(tokens.length - 1);
  }
  expect(harness.cache.residency.lost.counts.get("evicted") ?? 0).toBe(0);
});

test("a block that was loaded half full and filled at once is written through like any other", () => {
  const harness = crowded({ diskSlots: 0, hostSlots: 64, cache: { preloadLayers: 0 } });
  const first = ask(harness, prompt(40)).tokens;
  harness.settle();
  for (const seed of [2, 3]) ask(harness, prompt(50, seed));
  const second = ask(harness, [...first, ...prompt(7, 9)]).tokens;
  for (const seed of [4, 5]) ask(harness, prompt(50, seed));
  const { usage } = ask(harness, [...second, 6]);
  expect(usage.cachedTokens).toEqual({ gpu: 0, host: second.length - 1, disk: 0 });
});

test("host memory that is left to the next process is found whole, though the stop came at once", () => {
  const harness = crowded({ hostSlots: 32, diskSlots: 1 });
  const first = ask(harness, prompt(40)).tokens;
  while (harness.cache.flush(harness.nowMs)) {
    harness.nowMs++;
    harness.device.drain();
  }
  harness.cache.sealHost();
  const next = crowded({ hostSlots: 32, diskSlots: 0, survivor: harness.legacy.survivor! });
  expect(ask(next, [...first, 5]).usage.cachedTokens).toEqual({ gpu: 0, host: first.length - 1, disk: 0 });
});

describe("a full context window", () => {
  const options = { maxModelLen: 64, gpuBlocks: 20, hostSlots: 64, diskSlots: 64 };

  test("the conversation goes on, and what is kept is not computed again", () => {
    const harness = new EngineHarness(options);
    let tokens: readonly number[] = prompt(50);
    for (let turn = 0; turn < 12; turn++) {
      const rowsBefore = harness.engine.stats().rowsComputed;
      const finish = ask(harness, [...tokens, ...prompt(7, turn)], 9);
      if (turn > 0) expect(harness.engine.stats().rowsComputed - rowsBefore).toBeLessThanOrEqual(7 + 9);
      expect(finish.missReasons["truncated_restart"] ?? 0).toBe(0);
      tokens = [...finish.tokens];
    }
    expect(harness.answer(12).finish!.cache.droppedTokens).toBeGreaterThanOrEqual(96);
    harness.expectNothingLeft();
  });

  test("a later process goes on from disk as if it had computed everything itself", () => {
    const harness = new EngineHarness(options);
    let tokens: readonly number[] = ask(harness, prompt(60), 20).tokens as unknown as number[];
    harness.settle(IDLE_MS);
    for (let turn = 0; turn < 4; turn++) {
      const next = new EngineHarness({ ...options, ...harness.legacy });
      const finish = ask(next, [...tokens, ...prompt(9, turn)], 12);
      expect(finish.missReasons["truncated_restart"] ?? 0).toBe(0);
      ask(harness, [...tokens, ...prompt(9, turn)], 12);
      tokens = [...finish.tokens];
      harness.settle(IDLE_MS);
    }
  });

  test("when a block of the view is lost the view restarts, and the turns after that find it", () => {
    const harness = new EngineHarness({ ...options, hostSlots: 0, diskSlots: 0 });
    const finish = (id: number) => harness.answer(id).finish!;
    const first = harness.submit(prompt(60), { maxTokens: 30, sampling: ENDLESS });
    harness.runToEnd();
    const tokens = [...finish(first).tokens];
    harness.engine.forget(finish(first).blockIds);
    const second = harness.submit([...tokens, 3], { maxTokens: 6, sampling: ENDLESS });
    harness.runToEnd();
    expect(finish(second).missReasons["truncated_restart"]).toBeGreaterThan(20);
    const rowsBefore = harness.engine.stats().rowsComputed;
    const third = harness.submit([...finish(second).tokens, 4], { maxTokens: 3, sampling: ENDLESS });
    harness.runToEnd();
    expect(harness.engine.stats().rowsComputed - rowsBefore).toBeLessThanOrEqual(2 + 3);
    expect(finish(third).missReasons["truncated_restart"] ?? 0).toBe(0);
    harness.expectNothingLeft();
  });
});

describe("any history", () => {
  const seed = testSeed();

  interface Talk {
    tokens: number[];
    salt: Uint8Array;
  }

  function randomOptions(random: SeededRandom): HarnessOptions {
    const blockTokens = 2 ** random.integer(2, 4);
    const maxModelLen = 64;
    const least = Math.ceil((maxModelLen + 1) / blockTokens) + 2;
    const maxSequences = random.integer(1, 5);
    // All blocks with the same parent collide; roots stay apart.
    const blunt: BlockHasher = (parts) => sha256Hasher(parts.length === 2 ? [parts[0]!] : parts);
    return {
      random,
      blockTokens,
      maxModelLen,
      maxSequences,
      layers: random.next() < 0.7 ? random.integer(1, 3) : random.integer(4, 20),
      gpuBlocks: least + random.integer(0, 12),
      hostSlots: random.integer(0, 3) === 0 ? 0 : random.integer(1, 30),
      diskSlots: random.integer(0, 3) === 0 ? 0 : random.integer(1, 60),
      maxBatchTokens: maxSequences + random.integer(0, 30),
      loadAheadBlocks: random.integer(0, 12),
      queueCapacity: random.integer(4, 100),
      ...(random.next() < 0.1 && { hasher: blunt }),
      cache: {
        isExclusive: random.next() < 0.5,
        keepBlocks: random.integer(0, 2) % Math.max(1, Math.floor(maxModelLen / blockTokens / 2)),
        policy: (["scheduler-aware", "lru", "fifo"] as const)[random.integer(0, 2)]!,
        recompute: random.next() < 0.5 ? "never" : "auto",
        preloadLayers: random.next() < 0.5 ? null : random.integer(0, 3),
      },
      background: {
        admission: (["idle", "eviction", "second-touch"] as const)[random.integer(0, 2)]!,
        idleMs: random.integer(0, 40),
      },
    };
  }

  function nextTurn(random: SeededRandom, talks: Talk[]): Talk {
    const known = talks[random.integer(0, Math.max(0, talks.length - 1))];
    if (known === undefined || random.next() < 0.25) {
      const salt = new Uint8Array(32).fill(random.integer(0, 1));
      return { tokens: prompt(random.integer(1, 50), random.integer(0, 5)), salt };
    }
    // Going on, editing, regenerating, asking the same once more.
    const kept = random.next() < 0.7 ? known.tokens.length : random.integer(1, known.tokens.length);
    const fresh = random.next() < 0.2 ? 0 : random.integer(1, 12);
    const tokens = [...known.tokens.slice(0, kept), ...prompt(fresh, random.integer(0, 99))];
    return { tokens: tokens.slice(0, 220), salt: known.salt };
  }

  const FAULTS = { io: 0.05, noSpace: 0.03, torn: 0.03, lie: 0.03, flip: 0.05, hang: 0.02 };

  /** Runs a few dozen turns; every answer is the reference's, but for restarted views. Returns what was served. */
  function live(random: SeededRandom, options: HarnessOptions, talks: Talk[], hasFaults: boolean) {
    const harness = new EngineHarness(options);
    const served = { gpu: 0, host: 0, disk: 0, restarts: 0 };
    const asked = new Map<number, { talk: Talk; maxTokens: number }>();
    for (let turn = 0; turn < 400; turn++) {
      if (harness.disk !== null && hasFaults) {
        harness.disk.faults = random.next() < 0.7 ? NO_FAULTS : FAULTS;
        if (random.next() < 0.1) harness.disk.release();
      }
      if (random.next() < 0.12) {
        const talk = nextTurn(random, talks);
        const maxTokens = random.integer(1, 20);
        const keep = random.next() < 0.2 ? { ttlMs: random.integer(1, 200) } : { priority: random.integer(-2, 2) };
        const { salt } = talk;
        const id = harness.submit(talk.tokens, { salt, maxTokens, keep, sampling: ENDLESS });
        asked.set(id, { talk, maxTokens });
      }
      if (random.next() < 0.02) harness.nowMs += random.integer(1, 300);
      if (random.next() < 0.01 && talks.length > 0) {
        const forgotten = [...harness.choices.values()].find(({ finish }) => finish !== null);
        if (forgotten !== undefined) harness.engine.forget(forgotten.finish!.blockIds);
      }
      harness.turn();
      harness.cache.checkInvariants();
      collect(harness, asked, talks, served);
    }
    if (harness.disk !== null) harness.disk.faults = NO_FAULTS;
    harness.disk?.release();
    harness.runToEnd();
    collect(harness, asked, talks, served);
    expect(asked.size).toBe(0);
    harness.cache.checkInvariants();
    return { harness, served };
  }

  function collect(
    harness: EngineHarness,
    asked: Map<number, { talk: Talk; maxTokens: number }>,
    talks: Talk[],
    served: { gpu: number; host: number; disk: number; restarts: number },
  ): void {
    for (const [id, { talk, maxTokens }] of asked) {
      const { tokens, finish } = harness.answer(id);
      if (finish === null) continue;
      asked.delete(id);
      const expected = harness.reference({ tokens: Int32Array.from(talk.tokens), maxTokens, sampling: ENDLESS });
      if (finish.cache.isViewRestarted) served.restarts++;
      else expect(tokens, `request ${id}`).toEqual(expected.tokens);
      for (const tier of ["gpu", "host", "disk"] as const) served[tier] += finish.usage.cachedTokens[tier];
      talks.push({ tokens: [...finish.tokens], salt: talk.salt });
      if (talks.length > 12) talks.shift();
    }
  }

  test(`no tier, move, fault or restart changes a token (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    const total = { gpu: 0, host: 0, disk: 0, restarts: 0 };
    for (let round = 0; round < 8; round++) {
      const options = randomOptions(random);
      const talks: Talk[] = [];
      let legacy: Pick<HarnessOptions, "medium" | "survivor"> = {};
      for (let life = 0; life < 3; life++) {
        const { harness, served } = live(random, { ...options, ...legacy }, talks, round % 2 === 1);
        for (const key of ["gpu", "host", "disk", "restarts"] as const) total[key] += served[key];
        // Killed in the middle of whatever moves; or stopped in order.
        if (random.next() < 0.5) harness.settle();
        legacy = options.hostSlots === 0 ? {} : harness.legacy;
      }
    }
    expect(total.gpu).toBeGreaterThan(300);
    expect(total.host + total.disk).toBeGreaterThan(100);
  });
});
