// What may be in each slot of a disk, told from what was asked of it and how that ended: nothing else may ever be
// believed, and what ended well must be.

import type { DiskHarness } from "./disk-harness.ts";

type Content = Uint8Array;

interface Slot {
  /** Blocks that a restart may find here. */
  possible: Set<number>;
  /** Blocks that it may also find after a power failure: overwritten, not yet surely. */
  stale: Set<number>;
  /** Its block, when everything ended well; null: none; undefined: who knows. */
  known: number | null | undefined;
  /** Of its block, when this process wrote or read it. */
  content: Content | null;
  inFlight: number;
  endedAt: number;
}

export class DiskOracle {
  readonly #slots = new Map<number, Slot>();
  /** Everything that was ever handed over under a block's name. */
  readonly #contents = new Map<number, Content[]>();
  #now = 0;

  /**
   * isLying: success is reported for writes that did not happen; then only contents can be checked. isRotting: what
   * ended well may be lost.
   */
  constructor(readonly disk: { readonly isLying: boolean; readonly isRotting: boolean }) {}

  started(slot: number): number {
    this.slot(slot).inFlight++;
    return ++this.#now;
  }

  writeStarted(slot: number, number: number, content: Content): number {
    this.slot(slot).possible.add(number);
    this.#contents.set(number, [...(this.#contents.get(number) ?? []), content]);
    return this.started(slot);
  }

  readEnded(slot: number, content: Content): void {
    const state = this.#ended(slot);
    if (state.content !== null) return assertEqual(content, state.content, `slot ${slot}`);
    const numbers = typeof state.known === "number" ? [state.known] : [...state.possible, ...state.stale];
    this.#checkAny(numbers, content, `slot ${slot}`);
    state.content = content;
  }

  writeEnded(slot: number, number: number, content: Content): void {
    const state = this.#ended(slot);
    for (const other of state.possible) state.stale.add(other);
    if (!this.disk.isLying && state.inFlight === 0) state.possible = new Set([number]);
    state.known = number;
    state.content = content;
  }

  eraseEnded(slot: number, startedAt: number): void {
    const state = this.#ended(slot);
    state.known = null;
    state.content = null;
    if (this.disk.isLying || state.inFlight > 0) return;
    state.possible = new Set();
    state.stale = new Set();
    // The erase's sync also made durable what had ended before.
    for (const other of this.#slots.values()) {
      if (other.inFlight === 0 && other.endedAt < startedAt) other.stale = new Set();
    }
  }

  /** Not well; the slot may hold this or that. */
  failed(slot: number, kind: "read" | "write" | "erase"): void {
    const state = this.#ended(slot);
    if (kind === "read") return;
    state.known = undefined;
    state.content = null;
  }

  /** Throws when the block was never handed over with this content. */
  check(number: number, content: Content): void {
    this.#checkAny([number], content, `block ${number}`);
  }

  /** A restart found these blocks: number by slot. */
  restarted(found: ReadonlyMap<number, number>, crash: "kill" | "power failure", slotCount: number): void {
    for (const [slot, number] of found) this.#checkFound(slot, number, crash);
    const mayLose = this.disk.isLying || this.disk.isRotting || crash !== "kill";
    if (!mayLose) this.#checkMissing(new Set(found.values()), slotCount);
    for (const [slot, state] of this.#slots) {
      const number = found.get(slot);
      if (crash === "kill") for (const other of state.possible) state.stale.add(other);
      else state.stale = new Set();
      if (!this.disk.isLying) state.possible = new Set(number === undefined ? [] : [number]);
      state.known = number ?? null;
      state.content = null;
      state.inFlight = 0;
    }
  }

  slot(slot: number): Slot {
    let state = this.#slots.get(slot);
    if (state === undefined) {
      const none = { known: null, content: null, inFlight: 0, endedAt: 0 };
      this.#slots.set(slot, (state = { possible: new Set(), stale: new Set(), ...none }));
    }
    return state;
  }

  #checkAny(numbers: readonly number[], content: Content, what: string): void {
    const contents = numbers.flatMap((number) => this.#contents.get(number) ?? []);
    if (contents.some((known) => Buffer.compare(known, content) === 0)) return;
    throw new Error(`${what} was believed with bytes that were never written under its name`);
  }

  #checkFound(slot: number, number: number, crash: "kill" | "power failure"): void {
    const { possible, stale } = this.slot(slot);
    if (this.disk.isLying || possible.has(number) || (crash === "power failure" && stale.has(number))) return;
    throw new Error(`block ${number} came back in slot ${slot} after it was overwritten or erased`);
  }

  #checkMissing(found: ReadonlySet<number>, slotCount: number): void {
    for (const [slot, { known, inFlight }] of this.#slots) {
      if (slot >= slotCount || known === null || known === undefined || inFlight > 0) continue;
      if (!found.has(known)) throw new Error(`block ${known} of slot ${slot} is lost`);
    }
  }

  #ended(slot: number): Slot {
    const state = this.slot(slot);
    state.inFlight--;
    state.endedAt = ++this.#now;
    return state;
  }
}

function assertEqual(content: Content, expected: Content, what: string): void {
  if (Buffer.compare(content, expected) !== 0) throw new Error(`${what}: not the bytes that were written last`);
}

/** Reads every block that a restart found and checks its bytes; returns how many were believed. */
export function checkAll(harness: DiskHarness, oracle: DiskOracle, found: ReadonlyMap<number, number>): number {
  let believed = 0;
  for (const [slot, number] of found) {
    const { event, content } = harness.read(slot);
    if (event.outcome !== "ok") continue;
    oracle.check(number, content);
    believed++;
  }
  return believed;
}
