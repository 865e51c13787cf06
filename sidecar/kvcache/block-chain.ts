// The ids of a token sequence's full blocks, each hashed over the one before. Computed once, when first asked for,
// and kept with the sequence while it waits, runs, is preempted and resumes. Blocks computed after the context
// window overflowed also carry the view they were computed in; a chain that begins at a later view names what was
// computed afresh from there, because blocks of the view before it were lost.

import { type BlockHasher, type BlockId, blockId, viewId } from "./block-hash.ts";
import type { TruncationRule } from "./view.ts";

/** What identifies a block before its KV exists. */
export interface BlockName {
  readonly id: BlockId;
  readonly parentId: BlockId;
  /** 64-bit digest of the view and of all tokens before the block: a second witness, should two ids collide. */
  readonly prefixCheck: bigint;
}

/** Id and digest of a chain up to and including one block. */
interface Link {
  readonly id: BlockId;
  readonly check: bigint;
}

export class BlockChain {
  /** By full index; null for blocks that a restarted chain never has. */
  readonly #links: (Link | null)[] = [];
  readonly #viewIds: (BlockId | null)[];

  constructor(
    readonly root: BlockId,
    readonly rule: TruncationRule,
    readonly hash: BlockHasher,
    /** The same sequence under the fingerprint of the process before this one, if that left blocks under another. */
    readonly former: BlockChain | null = null,
    /** Drops behind the view that this chain begins with; 0: the conversation's own beginning. */
    readonly firstDrops = 0,
  ) {
    this.#viewIds = [firstDrops === 0 ? null : viewId(hash, null, root, this.#firstBlockAfterDrops)];
  }

  get blockTokens(): number {
    return this.rule.blockTokens;
  }

  /** For another sequence that begins with the same tokens; shares the ids known so far. */
  fork(): BlockChain {
    const fork = new BlockChain(this.root, this.rule, this.hash, this.former?.fork() ?? null, this.firstDrops);
    fork.#links.push(...this.#links);
    fork.#viewIds.splice(0, 1, ...this.#viewIds);
    return fork;
  }

  /** The chain of what is computed afresh from the view after `drops` drops. */
  restartAt(drops: number): BlockChain {
    return new BlockChain(this.root, this.rule, this.hash, this.former?.restartAt(drops) ?? null, drops);
  }

  /** Name of full block `index` of `tokens`, which must be the same tokens, or more, at every call. */
  name(index: number, tokens: ArrayLike<number>): BlockName {
    return { id: this.id(index, tokens), ...this.#parentName(index, tokens) };
  }

  id(index: number, tokens: ArrayLike<number>): BlockId {
    return this.#link(index, tokens)!.id;
  }

  /** Name of an open block: tokens[index * blockTokens, end). */
  openName(index: number, tokens: ArrayLike<number>, end: number): BlockName {
    const open = viewTokens(tokens, index * this.blockTokens, end);
    const parent = this.#parentName(index, tokens);
    const view = this.#viewOf(index, tokens);
    return { id: blockId(this.hash, parent.parentId, open, view), ...parent };
  }

  /** Parent of block `index`, as children are listed under it. */
  parent(index: number, tokens: ArrayLike<number>): Omit<BlockName, "id"> {
    return this.#parentName(index, tokens);
  }

  /** Ids of all full blocks of tokens[0, length) that this chain has names for. */
  *ids(tokens: ArrayLike<number>, length: number): Generator<BlockId> {
    for (let index = 0; (index + 1) * this.blockTokens <= length; index++) {
      const link = this.#link(index, tokens);
      if (link !== null) yield link.id;
    }
  }

  get #firstBlockAfterDrops(): number {
    return this.rule.keepBlocks + this.firstDrops * this.rule.dropBlocks;
  }

  #parentName(index: number, tokens: ArrayLike<number>): Omit<BlockName, "id"> {
    const { id, check } = this.#parentLink(index, tokens);
    const view = this.#viewOf(index, tokens);
    return { parentId: id, prefixCheck: view === null ? check : Bun.hash.xxHash64(view, check) };
  }

  #parentLink(index: number, tokens: ArrayLike<number>): Link {
    const before = this.#before(index);
    return before < 0 ? { id: this.root, check: 0n } : this.#link(before, tokens)!;
  }

  /** Full index of the block that block `index` follows in this chain; -1: none. */
  #before(index: number): number {
    return this.firstDrops > 0 && index === this.#firstBlockAfterDrops ? this.rule.keepBlocks - 1 : index - 1;
  }

  #link(index: number, tokens: ArrayLike<number>): Link | null {
    while (this.#links.length <= index) this.#links.push(this.#makeLink(this.#links.length, tokens));
    return this.#links[index]!;
  }

  #makeLink(index: number, tokens: ArrayLike<number>): Link | null {
    if (index >= this.rule.keepBlocks && index < this.#firstBlockAfterDrops) return null;
    const begin = index * this.blockTokens;
    const block = viewTokens(tokens, begin, begin + this.blockTokens);
    const parent = this.#parentLink(index, tokens);
    return {
      id: blockId(this.hash, parent.id, block, this.#viewOf(index, tokens)),
      check: Bun.hash.xxHash64(block, parent.check),
    };
  }

  /** Id of the view in which block `index` is computed; null before any drop. */
  #viewOf(index: number, tokens: ArrayLike<number>): BlockId | null {
    if (index < this.rule.keepBlocks) return null;
    const drops = Math.max(this.firstDrops, this.rule.dropsBefore(index * this.blockTokens));
    while (this.#viewIds.length <= drops - this.firstDrops) {
      const firstDropped = this.rule.fullIndex(
        this.rule.keepBlocks,
        this.firstDrops + this.#viewIds.length - 1,
      );
      const dropped = this.id(firstDropped, tokens);
      this.#viewIds.push(viewId(this.hash, this.#viewIds.at(-1)!, dropped, this.rule.dropBlocks));
    }
    return this.#viewIds[drops - this.firstDrops]!;
  }
}

/** A copy. */
export function sliceTokens(tokens: ArrayLike<number>, begin: number, end: number): Int32Array {
  if (tokens instanceof Int32Array) return tokens.slice(begin, end);
  const slice = new Int32Array(end - begin);
  for (let i = begin; i < end; i++) slice[i - begin] = tokens[i]!;
  return slice;
}

/** To read at once: where it can be, no copy. */
function viewTokens(tokens: ArrayLike<number>, begin: number, end: number): Int32Array {
  return tokens instanceof Int32Array ? tokens.subarray(begin, end) : sliceTokens(tokens, begin, end);
}
