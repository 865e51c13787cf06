// All blocks whose KV is kept somewhere, by id, and by parent: how a prompt finds the longest prefix that was
// computed before, to the token. Children are listed under their parent's id and not in the parent, so that
// they outlive an evicted parent and are found again when it is computed anew.

import { assert } from "../assert.ts";
import type { BlockId } from "./block-hash.ts";
import type { BlockNumber } from "./block-pool.ts";

/** Not resident in that tier. */
export const ABSENT = -1;

/** One block's KV: its meaning, and where copies of it lie. */
export interface CachedBlock {
  id: BlockId;
  readonly parentId: BlockId;
  /** Its token ids; fewer than a block's worth when it is the open last block of a conversation. */
  tokens: Int32Array;
  gpu: BlockNumber;
  host: BlockNumber;
  disk: BlockNumber;
}

/** The child that shares the longest run of leading tokens. */
export interface LongestChild {
  readonly block: CachedBlock;
  readonly length: number;
}

export class PrefixIndex {
  readonly #byId = new Map<BlockId, CachedBlock>();
  readonly #byParent = new Map<BlockId, Set<CachedBlock>>();

  get size(): number {
    return this.#byId.size;
  }

  /** The block of this id holding exactly tokens[begin, end); a hash collision is no hit. */
  find(id: BlockId, tokens: ArrayLike<number>, begin: number, end: number): CachedBlock | null {
    const block = this.#byId.get(id);
    if (block === undefined || block.tokens.length !== end - begin) return null;
    return commonLength(block.tokens, tokens, begin, end) === end - begin ? block : null;
  }

  has(id: BlockId): boolean {
    return this.#byId.has(id);
  }

  /** Null when no child shares even one token with tokens[begin, end). */
  longestChild(
    parentId: BlockId,
    tokens: ArrayLike<number>,
    begin: number,
    end: number,
  ): LongestChild | null {
    let best: LongestChild | null = null;
    for (const block of this.#byParent.get(parentId) ?? []) {
      const length = commonLength(block.tokens, tokens, begin, end);
      if (length > (best?.length ?? 0)) best = { block, length };
    }
    return best;
  }

  children(parentId: BlockId): Iterable<CachedBlock> {
    return this.#byParent.get(parentId) ?? [];
  }

  insert(block: CachedBlock): void {
    assert(!this.#byId.has(block.id), "the first block keeps its id");
    this.#byId.set(block.id, block);
    const siblings = this.#byParent.get(block.parentId);
    if (siblings === undefined) this.#byParent.set(block.parentId, new Set([block]));
    else siblings.add(block);
  }

  remove(block: CachedBlock): void {
    assert(this.#byId.get(block.id) === block, "the block is not in the index");
    this.#byId.delete(block.id);
    const siblings = this.#byParent.get(block.parentId)!;
    siblings.delete(block);
    if (siblings.size === 0) this.#byParent.delete(block.parentId);
  }

  /** An open block has received more tokens: same place, new name. */
  rename(block: CachedBlock, id: BlockId, tokens: Int32Array): void {
    this.remove(block);
    block.id = id;
    block.tokens = tokens;
    this.insert(block);
  }

  blocks(): IterableIterator<CachedBlock> {
    return this.#byId.values();
  }
}

function commonLength(
  blockTokens: Int32Array,
  tokens: ArrayLike<number>,
  begin: number,
  end: number,
): number {
  const limit = Math.min(blockTokens.length, end - begin);
  let length = 0;
  while (length < limit && blockTokens[length] === tokens[begin + length]) length++;
  return length;
}
