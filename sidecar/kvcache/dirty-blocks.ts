// The findable blocks that have no copy on disk, and when each was last used: what the disk should be given before they
// have to leave host memory.

import type { CachedBlock } from "./cached-block.ts";

export class DirtyBlocks {
  readonly #wanted = new Map<CachedBlock, number>();
  readonly #usedOnce = new Map<CachedBlock, number>();

  /** `wantsSecondUse`: who was used once only is not wanted on disk. */
  constructor(readonly wantsSecondUse: boolean) {}

  get size(): number {
    return this.#wanted.size + this.#usedOnce.size;
  }

  get wantedCount(): number {
    return this.#wanted.size;
  }

  add(block: CachedBlock, usedAtMs: number): void {
    this.delete(block);
    const isWanted = !this.wantsSecondUse || block.useCount > 1;
    (isWanted ? this.#wanted : this.#usedOnce).set(block, usedAtMs);
  }

  delete(block: CachedBlock): boolean {
    return this.#wanted.delete(block) || this.#usedOnce.delete(block);
  }

  /** The block, if it is dirty, was used: it is idle from now on anew. */
  touch(block: CachedBlock, nowMs: number): void {
    if (this.delete(block)) this.add(block, nowMs);
  }

  /** With the time of their last use, the longest idle first. May be deleted meanwhile. */
  wanted(): Iterable<[CachedBlock, number]> {
    return this.#wanted;
  }

  /** Those wanted first. */
  *all(): Generator<[CachedBlock, number]> {
    yield* this.#wanted;
    yield* this.#usedOnce;
  }
}
