// Which block of one tier goes next. Resident blocks are pinned (running, or a load or save is in flight) or
// evictable, and only evictable ones are ever offered.

import { assert } from "../assert.ts";
import { type BlockUse, OUTSIDE_WINDOW } from "./block-use.ts";
import { IndexedHeap } from "./indexed-heap.ts";

export type PolicyName = "scheduler-aware" | "lru" | "fifo";

export class VictimOrder<Block extends BlockUse> {
  readonly #evictable: IndexedHeap<Block>;
  #entryCount = 0;
  #residentCount = 0;

  readonly #comesFirst: (a: BlockUse, b: BlockUse) => boolean;

  constructor(
    readonly policy: PolicyName,
    /** Index of the tier in the per-tier fields of BlockUse. */
    readonly tierIndex: number,
  ) {
    this.#comesFirst = policy === "fifo" ? enteredFirst(tierIndex) : leastNeeded;
    this.#evictable = new IndexedHeap<Block>(tierIndex, this.#comesFirst);
  }

  get residentCount(): number {
    return this.#residentCount;
  }

  get evictableCount(): number {
    return this.#evictable.size;
  }

  get pinnedCount(): number {
    return this.#residentCount - this.#evictable.size;
  }

  has(block: Block): boolean {
    return block.enteredAt[this.tierIndex]! > 0;
  }

  isPinned(block: Block): boolean {
    return this.has(block) && !this.#evictable.has(block);
  }

  /**
   * The block now has a place in this tier, and is pinned. `parent`: the block it continues, null for a
   * first block.
   */
  insert(block: Block, parent: Block | null): void {
    assert(!this.has(block), "the block is resident already");
    // A conversation is as old as its first block: first in, first out must not strand a suffix.
    const parentEnteredAt = parent?.enteredAt[this.tierIndex] ?? 0;
    block.enteredAt[this.tierIndex] = parentEnteredAt > 0 ? parentEnteredAt : ++this.#entryCount;
    this.#residentCount++;
  }

  /** Nobody uses it any more: it may be evicted from now on. */
  release(block: Block): void {
    assert(this.has(block), "the block is not resident");
    this.#evictable.add(block);
  }

  /** Somebody uses it: it stays. */
  retain(block: Block): void {
    this.#evictable.remove(block);
  }

  /** The block has lost its place in this tier. */
  remove(block: Block): void {
    assert(this.has(block), "the block is not resident");
    if (this.#evictable.has(block)) this.#evictable.remove(block);
    block.enteredAt[this.tierIndex] = 0;
    this.#residentCount--;
  }

  /** The next victim, or null when every resident block is pinned. It stays until remove(). */
  next(): Block | null {
    return this.#evictable.peek();
  }

  /** Whether a block that wants to come into this full tier is worth more than its next victim. */
  isWorthReplacing(block: Block): boolean {
    const victim = this.next();
    if (victim === null) return false;
    return this.policy === "fifo" || this.#comesFirst(victim, block);
  }

  /** The block's recency or need has changed. */
  reorder(block: Block): void {
    if (this.#evictable.has(block)) this.#evictable.update(block);
  }

  /** For tests. */
  checkInvariants(): void {
    this.#evictable.checkInvariants();
    for (const block of this.#evictable.items()) assert(this.has(block), "an evictable block is resident");
  }
}

/**
 * Outside the window by least recent use; inside, the furthest sequence first; the last block before its
 * prefix.
 */
function leastNeeded(a: BlockUse, b: BlockUse): boolean {
  if (a.neededAt !== b.neededAt) return a.neededAt > b.neededAt;
  if (a.neededAt === OUTSIDE_WINDOW && a.recencyMs !== b.recencyMs) return a.recencyMs < b.recencyMs;
  return a.depth > b.depth;
}

function enteredFirst(tierIndex: number): (a: BlockUse, b: BlockUse) => boolean {
  return (a, b) => {
    const [aEntered, bEntered] = [a.enteredAt[tierIndex]!, b.enteredAt[tierIndex]!];
    return aEntered === bEntered ? a.depth > b.depth : aEntered < bEntered;
  };
}
