// The blocks of one tier: who uses each, and which to give away next. A block is free (holds nothing), in use
// (refCount > 0), or evictable (refCount 0, still holding a cached prefix). One class serves all three tiers.

import { assert } from "../assert.ts";

/** Index of a block in its tier: a gpu block, a host slot or a disk slot. */
export type BlockNumber = number;

export class BlockPool<Owner> {
  readonly #refCounts: Uint32Array;
  readonly #owners: (Owner | null)[];
  /** Lowest numbers on top, so that neighbours are handed out together and copies coalesce. */
  readonly #free: BlockNumber[];
  /** refCount 0 with an owner, oldest first: a Set keeps order and deletes in O(1). */
  readonly #evictable = new Set<BlockNumber>();

  constructor(readonly blockCount: number) {
    this.#refCounts = new Uint32Array(blockCount);
    this.#owners = new Array<Owner | null>(blockCount).fill(null);
    this.#free = Array.from({ length: blockCount }, (_, i) => blockCount - 1 - i);
  }

  /** Blocks that allocate() could hand out, evicting where it must. */
  get availableCount(): number {
    return this.#free.length + this.#evictable.size;
  }

  get freeCount(): number {
    return this.#free.length;
  }

  /** A free block with refCount 1, or null: then evict(), or wait. */
  allocate(): BlockNumber | null {
    const block = this.#free.pop();
    if (block === undefined) return null;
    this.#refCounts[block] = 1;
    return block;
  }

  /** Evictable blocks, the next victim of plain LRU first. */
  evictable(): IterableIterator<BlockNumber> {
    return this.#evictable.values();
  }

  /** Forgets what an evictable block holds; returns its owner, whose reference to it is now stale. */
  evict(block: BlockNumber): Owner {
    assert(this.#evictable.delete(block), `block ${block} is not evictable`);
    const owner = this.#owners[block]!;
    this.#owners[block] = null;
    this.#free.push(block);
    return owner;
  }

  retain(block: BlockNumber): void {
    if (this.#refCounts[block]!++ === 0) {
      assert(this.#evictable.delete(block), `block ${block} is free and cannot be retained`);
    }
  }

  /** One user fewer; at zero an owned block becomes the newest evictable one, any other is free. */
  release(block: BlockNumber): void {
    assert(this.#refCounts[block]! > 0, `block ${block} was released twice`);
    if (--this.#refCounts[block]! > 0) return;
    if (this.#owners[block] === null) this.#free.push(block);
    else this.#evictable.add(block);
  }

  refCount(block: BlockNumber): number {
    return this.#refCounts[block]!;
  }

  owner(block: BlockNumber): Owner | null {
    return this.#owners[block]!;
  }

  /** Says what a block in use holds (null: nothing worth keeping). */
  setOwner(block: BlockNumber, owner: Owner | null): void {
    assert(this.#refCounts[block]! > 0, `block ${block} is not in use`);
    this.#owners[block] = owner;
  }

  /** Throws unless every block is exactly one of free, in use, evictable. For tests. */
  checkInvariants(): void {
    const free = new Set(this.#free);
    assert(free.size === this.#free.length, "a block is free twice");
    for (let block = 0; block < this.blockCount; block++) {
      const inUse = this.#refCounts[block]! > 0;
      const places = Number(inUse) + Number(free.has(block)) + Number(this.#evictable.has(block));
      assert(places === 1, `block ${block} is in ${places} places`);
      if (free.has(block)) assert(this.#owners[block] === null, `free block ${block} has an owner`);
      if (this.#evictable.has(block)) {
        assert(this.#owners[block] !== null, `evictable block ${block} holds nothing`);
      }
    }
  }
}
