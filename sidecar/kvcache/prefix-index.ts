// All blocks whose KV is kept somewhere, by id, and by parent: how a prompt finds the longest prefix that was
// computed before, to the token. Children are listed under their parent's id and not in the parent, so that
// they outlive an evicted parent and are found again when it is computed anew.

import { assert } from "../assert.ts";
import type { BlockName } from "./block-chain.ts";
import type { BlockId } from "./block-hash.ts";
import type { CachedBlock } from "./cached-block.ts";

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

  /**
   * The block of this name holding exactly tokens[begin, end). A block of the same id that holds other tokens, or
   * follows others, is a collision: "collision", and no hit.
   */
  find(
    name: BlockName,
    tokens: ArrayLike<number>,
    begin: number,
    end: number,
  ): CachedBlock | "collision" | null {
    const block = this.#byId.get(name.id);
    if (block === undefined) return null;
    const isSame =
      block.parentId === name.parentId &&
      block.prefixCheck === name.prefixCheck &&
      block.tokens.length === end - begin &&
      commonLength(block.tokens, tokens, begin, end) === end - begin;
    return isSame ? block : "collision";
  }

  get(id: BlockId): CachedBlock | null {
    return this.#byId.get(id) ?? null;
  }

  has(id: BlockId): boolean {
    return this.#byId.has(id);
  }

  /** Null when no child shares even one token with tokens[begin, end). `isEligible` may rule children out. */
  longestChild(
    { parentId, prefixCheck }: Omit<BlockName, "id">,
    tokens: ArrayLike<number>,
    begin: number,
    end: number,
    isEligible: (block: CachedBlock) => boolean = () => true,
  ): LongestChild | null {
    let best: LongestChild | null = null;
    for (const block of this.#byParent.get(parentId) ?? []) {
      if (block.prefixCheck !== prefixCheck || !isEligible(block)) continue;
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
