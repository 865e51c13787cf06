// The disk tier: which block is in which slot of the file, what is being read and written, and whether the disk can be
// trusted. A disk that fails several times in a row is left alone for a while; one whose reads do not come back is
// given up.

import type { HostAddress } from "../native.ts";
import { type BlockNumber, BlockPool } from "./block-pool.ts";
import type { CachedBlock } from "./cached-block.ts";
import type { DiskEvent, DiskOutcome, DiskStore } from "./disk-store.ts";
import type { VictimOrder } from "./victim-order.ts";

/** Failures in a row after which the disk is left alone, and for how long. */
const FAILURES_MAX = 4;
const PAUSE_MS = 30_000;
/** Operations that the kernel never answered, after which the disk is given up. */
const ABANDONED_MAX = 4;

/** A block moving between a host slot and a disk slot; both stay in use meanwhile. */
interface Move {
  readonly block: CachedBlock;
  readonly hostSlot: BlockNumber;
  readonly diskSlot: BlockNumber;
}

/** How a read or write ended. */
export interface EndedMove extends Move {
  readonly kind: "read" | "write";
  readonly outcome: DiskOutcome;
  readonly bytes: number;
  readonly elapsedMs: number;
  /** False: the kernel may still touch the host slot; the same move ends once more when it no longer can. */
  readonly isMemoryFree: boolean;
}

export class DiskTier {
  readonly pool: BlockPool<CachedBlock>;
  readonly #reads = new Map<BlockNumber, Move>();
  readonly #writes = new Map<BlockNumber, Move>();
  /** Slots that failed to give back what was written. */
  readonly #retired = new Set<BlockNumber>();
  /** Slots that are being erased, or will be when what moves there has ended; and since which deletion of all. */
  readonly #condemned = new Map<BlockNumber, number>();
  #deletions = 0;
  /** Erases that failed: they are tried again, because what they leave could be believed by the next start. */
  readonly #unerased = new Set<BlockNumber>();
  #eraseAgainAtMs = 0;
  #failures = 0;
  #pausedUntilMs = 0;
  #abandoned = 0;
  #isGivenUp = false;
  readBytes = 0;
  writtenBytes = 0;
  failureCount = 0;

  constructor(
    readonly store: DiskStore,
    order: VictimOrder<CachedBlock>,
    readonly onMessage: (message: string) => void,
  ) {
    this.pool = new BlockPool(store.options.slotCount, order);
  }

  get readingCount(): number {
    return this.#reads.size;
  }

  get writingCount(): number {
    return this.#writes.size;
  }

  /** That are waited for: not those that were given up. */
  get operationCount(): number {
    return this.store.operationCount - this.#abandoned;
  }

  isOn(nowMs: number): boolean {
    return !this.#isGivenUp && nowMs >= this.#pausedUntilMs;
  }

  /** Both slots must be in use by the caller; they are given back by who handles the ended move. */
  write(move: Move, address: HostAddress, nowMs: number): void {
    const { id, parentId, prefixCheck, depth, tokens, recencyMs, expiresAtMs } = move.block;
    this.#writes.set(move.diskSlot, move);
    const identity = { id, parentId, prefixCheck, depth, tokens, lastUsedAtMs: recencyMs, expiresAtMs };
    this.store.write(move.diskSlot, address, identity, nowMs);
  }

  read(move: Move, address: HostAddress, nowMs: number): void {
    this.#reads.set(move.diskSlot, move);
    this.store.read(move.diskSlot, address, nowMs);
  }

  /** Stands for all that was deleted so far, see isErased(). */
  get deletions(): number {
    return this.#deletions;
  }

  /** All of the first `deletions` are off the medium, or that has failed (it is tried again). */
  isErased(deletions: number): boolean {
    for (const each of this.#condemned.values()) if (each <= deletions) return false;
    return true;
  }

  /** Operations that were given up may still end, and then there is something to do. */
  get hasAbandoned(): boolean {
    return this.#abandoned > 0;
  }

  /** Off until the next start. */
  get isGivenUp(): boolean {
    return this.#isGivenUp;
  }

  /** Some could not be emptied: that will be tried again. */
  get hasUnerased(): boolean {
    return this.#unerased.size > 0;
  }

  /** Empties a slot that nobody owns and the caller has in use; it is free once that is on the medium. */
  erase(slot: BlockNumber, nowMs: number): void {
    this.condemn(slot);
    this.store.erase(slot, nowMs);
  }

  /** The same for a slot that stays out of use. */
  eraseForGood(slot: BlockNumber, nowMs: number): void {
    this.#retired.add(slot);
    this.erase(slot, nowMs);
  }

  /** The slot's block is gone, and who moves it will erase the slot. */
  condemn(slot: BlockNumber): void {
    if (!this.#condemned.has(slot)) this.#condemned.set(slot, ++this.#deletions);
  }

  poll(nowMs: number): EndedMove[] {
    this.#eraseAgain(nowMs);
    return this.store.poll(nowMs).flatMap((event) => this.#end(event, nowMs) ?? []);
  }

  #end({ kind, slot, outcome, bytes, elapsedMs }: DiskEvent, nowMs: number): EndedMove | null {
    if (kind === "released") return this.#endReleased(slot);
    this.#judge(outcome, nowMs);
    if (kind === "erase") {
      this.#endErase(slot, outcome, nowMs);
      return null;
    }
    // It may never end: whoever deleted the block must not wait for that. If it ends, the slot is erased all the same.
    if (outcome === "timeout") this.#condemned.delete(slot);
    const moves = kind === "write" ? this.#writes : this.#reads;
    const move = moves.get(slot)!;
    const isMemoryFree = outcome !== "timeout";
    if (isMemoryFree) moves.delete(slot);
    if (outcome === "ok" && kind === "read") this.readBytes += bytes;
    if (outcome === "ok" && kind === "write") this.writtenBytes += bytes;
    return { ...move, kind, outcome, bytes, elapsedMs, isMemoryFree };
  }

  #endErase(slot: BlockNumber, outcome: DiskOutcome, nowMs: number): void {
    this.#condemned.delete(slot);
    if (outcome === "ok") {
      if (!this.#retired.has(slot)) this.pool.release(slot);
      return;
    }
    this.#unerased.add(slot);
    this.#eraseAgainAtMs = nowMs + PAUSE_MS;
  }

  #eraseAgain(nowMs: number): void {
    if (this.#unerased.size === 0 || nowMs < this.#eraseAgainAtMs || !this.isOn(nowMs)) return;
    for (const slot of this.#unerased) this.erase(slot, nowMs);
    this.#unerased.clear();
  }

  #endReleased(slot: BlockNumber): EndedMove | null {
    this.#abandoned--;
    for (const [kind, moves] of [["read", this.#reads], ["write", this.#writes]] as const) {
      const move = moves.get(slot);
      if (move === undefined) continue;
      moves.delete(slot);
      return { ...move, kind, outcome: "timeout", bytes: 0, elapsedMs: 0, isMemoryFree: true };
    }
    return null;
  }

  #judge(outcome: DiskOutcome, nowMs: number): void {
    if (outcome === "ok") {
      this.#failures = 0;
      return;
    }
    this.failureCount++;
    if (outcome === "timeout" && ++this.#abandoned === ABANDONED_MAX) {
      this.#isGivenUp = true;
      this.onMessage(`disk tier: ${ABANDONED_MAX} operations did not come back: it is off until the next start`);
    }
    if (++this.#failures < FAILURES_MAX) return;
    this.#failures = 0;
    this.#pausedUntilMs = nowMs + PAUSE_MS;
    this.onMessage(`disk tier: ${FAILURES_MAX} failures in a row (${outcome}): left alone for ${PAUSE_MS / 1000} s`);
  }
}
