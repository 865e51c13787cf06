// Random operations on a faulty disk, with crashes at any moment: whatever is believed is what was written under
// that name, nothing that was overwritten or erased comes back, nothing that ended well is lost, and every slot
// stays usable.

import { describe, expect, test } from "bun:test";
import type { DiskEvent } from "../../../sidecar/kvcache/disk-store.ts";
import type { HostAddress, HostBuffer } from "../../../sidecar/native.ts";
import { DiskHarness, type HarnessOptions, testIdentity } from "../../support/disk-harness.ts";
import { DiskMedium } from "../../support/disk-medium.ts";
import { checkAll, DiskOracle } from "../../support/disk-oracle.ts";
import { type DiskFaults, NO_FAULTS } from "../../support/faulty-disk.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

/** On both sides of the border between two groups of headers. */
const SLOTS = [0, 1, 2, 254, 255, 256, 257, 258];
const SLOT_COUNTS = [255, 256, 259, 300];
const BLOCKS = 12;
const STEPS = 120;
const LIVES = 6;

interface Pending {
  readonly kind: "read" | "write" | "erase";
  readonly slot: number;
  readonly buffer: HostBuffer | null;
  readonly number: number;
  readonly content: Uint8Array | null;
  readonly startedAt: number;
  isTimedOut: boolean;
}

interface Scenario {
  readonly faults: Partial<DiskFaults>;
  readonly crash: "kill" | "power failure" | "either";
  /** Probability per step that a bit of the medium flips. */
  readonly rot?: number;
  readonly canResize?: boolean;
}

/** One process's life on the disk, from start to crash. */
class Life {
  readonly harness: DiskHarness;
  readonly found: Map<number, number>;
  readonly #pending: Pending[] = [];
  outcomes: Record<string, number> = {};

  constructor(
    readonly random: SeededRandom,
    readonly oracle: DiskOracle,
    options: HarnessOptions,
  ) {
    const harness = DiskHarness.open({ ...options, random });
    this.harness = harness;
    this.found = new Map(harness.scanned.blocks.map(({ slot, depth }) => [slot, depth]));
  }

  step(): void {
    const slots = SLOTS.filter((slot) => slot < this.harness.slotCount);
    const slot = slots[this.random.integer(0, slots.length - 1)]!;
    const choice = this.random.next();
    if (choice < 0.35) this.#write(slot);
    else if (choice < 0.5) this.#erase(slot);
    else if (choice < 0.7) this.#read(slot);
    else this.poll();
  }

  poll(): void {
    for (const event of this.harness.poll()) this.#ended(event);
  }

  settle(): void {
    this.harness.disk.faults = NO_FAULTS;
    this.harness.disk.release();
    const { store, disk } = this.harness;
    for (let polls = 0; store.operationCount + disk.inFlight > 0 && polls < 10_000; polls++) this.poll();
    expect([store.operationCount, disk.inFlight]).toEqual([0, 0]);
    expect(this.#pending).toEqual([]);
  }

  #write(slot: number): void {
    const number = this.random.integer(0, BLOCKS - 1);
    const content = this.harness.randomContent();
    const buffer = this.harness.takeBuffer(content);
    const startedAt = this.oracle.writeStarted(slot, number, content);
    this.#pending.push({ kind: "write", slot, buffer, number, content, startedAt, isTimedOut: false });
    this.harness.store.write(slot, buffer.address, testIdentity(number), this.harness.nowMs);
  }

  /** Only of a slot that holds a block, as far as one knows. */
  #read(slot: number): void {
    if (typeof this.oracle.slot(slot).known !== "number") return;
    const buffer = this.harness.takeBuffer();
    const startedAt = this.oracle.started(slot);
    this.#pending.push({ kind: "read", slot, buffer, number: -1, content: null, startedAt, isTimedOut: false });
    this.harness.store.read(slot, buffer.address, this.harness.nowMs);
  }

  #erase(slot: number): void {
    const startedAt = this.oracle.started(slot);
    const rest = { buffer: null, number: -1, content: null, isTimedOut: false };
    this.#pending.push({ kind: "erase", slot, startedAt, ...rest });
    this.harness.store.erase(slot, this.harness.nowMs);
  }

  #ended(event: DiskEvent): void {
    const pending = this.#find(event);
    const { kind, slot, number, startedAt, buffer } = pending;
    const name = `${event.kind} ${event.outcome}`;
    this.outcomes[name] = (this.outcomes[name] ?? 0) + 1;
    if (event.kind === "released") return this.#forget(pending);
    const content = buffer === null ? null : new Uint8Array(buffer.bytes).slice();
    if (event.outcome !== "ok") this.oracle.failed(slot, kind);
    else if (kind === "read") this.oracle.readEnded(slot, content!);
    else if (kind === "write") this.oracle.writeEnded(slot, number, pending.content!);
    else this.oracle.eraseEnded(slot, startedAt);
    if (event.outcome === "timeout") pending.isTimedOut = true;
    else this.#forget(pending);
  }

  #find({ kind, slot, address }: DiskEvent): Pending {
    const isIt = (pending: Pending) =>
      pending.slot === slot &&
      (pending.buffer?.address ?? (0 as HostAddress)) === address &&
      (kind === "released" ? pending.isTimedOut : pending.kind === kind && !pending.isTimedOut);
    const pending = this.#pending.find(isIt);
    if (pending === undefined) throw new Error(`nobody waits for ${kind} of slot ${slot}`);
    return pending;
  }

  #forget(pending: Pending): void {
    this.#pending.splice(this.#pending.indexOf(pending), 1);
    if (pending.buffer !== null) this.harness.giveBuffer(pending.buffer);
  }
}

/** Returns what happened, so that a test can show that it met what it is about. */
function play(seed: number, { faults, crash, rot = 0, canResize = false }: Scenario): Record<string, number> {
  const random = new SeededRandom(seed);
  const oracle = new DiskOracle({ isLying: (faults.lie ?? 0) > 0, isRotting: rot > 0 });
  const isClean = Object.keys(faults).length === 0 && crash === "kill" && rot === 0;
  const seen: Record<string, number> = {};
  let medium = new DiskMedium();
  let slotCount = 259;
  let kind: "kill" | "power failure" = "kill";
  for (let life = 0; life < LIVES; life++) {
    if (canResize) slotCount = SLOT_COUNTS[random.integer(0, SLOT_COUNTS.length - 1)]!;
    const options = {
      medium,
      slotCount,
      headerBuffers: random.integer(1, 4),
      queueCapacity: random.integer(1, 8),
      ...((faults.hang ?? 0) > 0 ? { readTimeoutMs: 8, writeTimeoutMs: 12 } : {}),
    };
    const now = new Life(random, oracle, options);
    if (life > 0) oracle.restarted(now.found, kind, slotCount);
    const believed = checkAll(now.harness, oracle, now.found);
    if (isClean) expect(believed).toBe(now.found.size);
    now.harness.disk.faults = { ...NO_FAULTS, ...faults };
    for (let step = 0; step < STEPS; step++) {
      now.step();
      if (random.next() < rot) flipSomeBit(medium, random);
      if (random.next() < 0.05) now.harness.disk.release();
    }
    add(seen, { ...now.outcomes, found: now.found.size, believed });
    kind = crash !== "either" ? crash : random.next() < 0.5 ? "kill" : "power failure";
    if (life === LIVES - 1) checkUsable(now);
    else medium = now.harness.disk.crash(kind);
  }
  return seen;
}

function checkUsable(life: Life): void {
  life.settle();
  const { harness } = life;
  for (let slot = 0; slot < harness.slotCount; slot++) {
    const content = harness.randomContent();
    expect(harness.write(slot, slot + 100, content).outcome).toBe("ok");
    const read = harness.read(slot);
    expect(read.event.outcome).toBe("ok");
    expect(Buffer.compare(read.content, content)).toBe(0);
  }
}

function flipSomeBit(medium: DiskMedium, random: SeededRandom): void {
  const pages = medium.pages();
  if (pages.length > 0) medium.flipBit(pages[random.integer(0, pages.length - 1)]!, random.integer(0, 4096 * 8 - 1));
}

function add(sums: Record<string, number>, more: Record<string, number>): void {
  for (const name in more) sums[name] = (sums[name] ?? 0) + more[name]!;
}

const SCENARIOS: Readonly<Record<string, Scenario & { readonly meets: readonly string[] }>> = {
  "kill": { faults: {}, crash: "kill", meets: ["write ok", "read ok", "erase ok", "believed"] },
  "power failure": { faults: {}, crash: "power failure", meets: ["write ok", "erase ok", "believed"] },
  "a file that changes its size": { faults: {}, crash: "kill", canResize: true, meets: ["believed"] },
  "errors, no space, torn writes": {
    faults: { io: 0.1, noSpace: 0.05, torn: 0.1 },
    crash: "either",
    meets: ["write io", "write no-space", "read io", "erase io", "believed"],
  },
  "bits that flip, on the way and on the medium": {
    faults: { flip: 0.2 },
    crash: "kill",
    rot: 0.1,
    meets: ["read corrupt", "read ok", "believed"],
  },
  "requests that never end": {
    faults: { hang: 0.1 },
    crash: "either",
    canResize: true,
    meets: ["read timeout", "write timeout", "erase timeout", "released timeout", "believed"],
  },
  "a disk that lies, and everything else": {
    faults: { lie: 0.1, io: 0.05, noSpace: 0.03, torn: 0.05, flip: 0.05, hang: 0.03 },
    crash: "either",
    rot: 0.05,
    canResize: true,
    meets: ["read corrupt", "write io", "read timeout", "believed"],
  },
};

describe.each(Object.entries(SCENARIOS))("%s", (_, { meets, ...scenario }) => {
  const seed = testSeed();
  test(`nothing false is believed, nothing is lost (SEED=${seed})`, () => {
    const seen: Record<string, number> = {};
    for (let round = 0; round < 8; round++) add(seen, play(seed + round, scenario));
    for (const name of meets) expect([name, (seen[name] ?? 0) > 0]).toEqual([name, true]);
  }, 60_000);
});
