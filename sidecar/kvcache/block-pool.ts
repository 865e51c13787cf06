// The blocks of one tier: who uses each, and which may be given away. A block is free (holds nothing), in use
// (refCount > 0), or evictable (refCount 0, still holding a cached prefix). One class serves all three tiers; which
// evictable block goes first is the policy's business (victim-order.ts).

import { assert } from "../assert.ts";
import type { BlockUse } from "./block-use.ts";
import type { VictimOrder } from "./victim-order.ts";

/** Index of a block in its tier: a gpu block, a host slot or a disk slot. */
export type BlockNumber = number;

export class BlockPool<Owner extends BlockUse> {
  readonly #refCounts: Uint32Array;
  readonly #owners: (Owner | null)[];
  /** Lowest numbers on top, so that neighbours are handed out together and copies coalesce. */
  readonly #free: BlockNumber[];

  constructor(
    readonly blockCount: number,
    /** Hears of every block that comes, goes, is used and is let go. */
    readonly order: VictimOrder<Owner>,
  ) {
    this.#refCounts = new Uint32Array(blockCount);
    this.#owners = new Array<Owner | null>(blockCount).fill(null);
    this.#free = Array.from({ length: blockCount }, (_, i) => blockCount - 1 - i);
  }

  /** Blocks that could be handed out, evicting where it must be. */
  get availableCount(): number {
    return this.#free.length + this.order.evictableCount;
  }

  get freeCount(): number {
    return this.#free.length;
  }

  /** A free block with refCount 1, or null: then evict() a victim, or wait. */
  allocate(): BlockNumber | null {
    const block = this.#free.pop();
    if (block === undefined) return null;
    this.#refCounts[block] = 1;
    return block;
  }

  /** Takes these very blocks, which must be free: for what was found in them at start. */
  claim(blocks: ReadonlySet<BlockNumber>): void {
    const left = this.#free.filter((block) => !blocks.has(block));
    assert(left.length + blocks.size === this.#free.length, "a claimed block is not free");
    this.#free.length = 0;
    for (const block of left) this.#free.push(block);
    for (const block of blocks) this.#refCounts[block] = 1;
  }

  /** Whose evictable block should go next; null: all are free or in use. */
  victim(): Owner | null {
    return this.order.next();
  }

  retain(block: BlockNumber): void {
    const owner = this.#owners[block]!;
    if (this.#refCounts[block]!++ > 0) return;
    assert(owner !== null, `block ${block} is free and cannot be retained`);
    this.order.retain(owner);
  }

  /** One user fewer; at zero an owned block becomes evictable, any other is free. */
  release(block: BlockNumber): void {
    assert(this.#refCounts[block]! > 0, `block ${block} was released twice`);
    if (--this.#refCounts[block]! > 0) return;
    const owner = this.#owners[block]!;
    if (owner === null) this.#free.push(block);
    else this.order.release(owner);
  }

  refCount(block: BlockNumber): number {
    return this.#refCounts[block]!;
  }

  owner(block: BlockNumber): Owner | null {
    return this.#owners[block]!;
  }

  /** Says what a block in use holds. `parent`: the block that `owner` continues, if that is known. */
  setOwner(block: BlockNumber, owner: Owner, parent: Owner | null): void {
    assert(this.#refCounts[block]! > 0, `block ${block} is not in use`);
    assert(this.#owners[block] === null, `block ${block} has an owner`);
    this.#owners[block] = owner;
    this.order.insert(owner, parent);
  }

  /** Forgets what the block holds: an evictable one is free now, one in use when its last user lets go. */
  disown(block: BlockNumber): void {
    const owner = this.#owners[block]!;
    assert(owner !== null, `block ${block} has no owner`);
    this.order.remove(owner);
    this.#owners[block] = null;
    if (this.#refCounts[block] === 0) this.#free.push(block);
  }

  /** Throws unless every block is exactly one of free, in use, evictable. For tests. */
  checkInvariants(): void {
    const free = new Set(this.#free);
    assert(free.size === this.#free.length, "a block is free twice");
    let evictable = 0;
    for (let block = 0; block < this.blockCount; block++) {
      const owner = this.#owners[block]!;
      const inUse = this.#refCounts[block]! > 0;
      if (free.has(block)) assert(!inUse && owner === null, `free block ${block} is in use or owned`);
      else assert(inUse || owner !== null, `block ${block} is lost`);
      if (owner === null) continue;
      assert(this.order.isPinned(owner) === inUse, `block ${block} is pinned otherwise than in use`);
      if (!inUse) evictable++;
    }
    assert(evictable === this.order.evictableCount, "the victim order knows other blocks");
  }
}
