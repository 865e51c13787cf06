// The ids of a token sequence's full blocks, each hashed over the one before. Computed once, when first asked for,
// and kept with the sequence while it waits, runs, is preempted and resumes.

import { type BlockHasher, type BlockId, blockId } from "./block-hash.ts";

export class BlockChain {
  readonly #ids: BlockId[] = [];

  constructor(
    readonly root: BlockId,
    readonly blockTokens: number,
    readonly hash: BlockHasher,
  ) {}

  /** For another sequence that begins with the same tokens; shares the ids known so far. */
  fork(): BlockChain {
    const fork = new BlockChain(this.root, this.blockTokens, this.hash);
    fork.#ids.push(...this.#ids);
    return fork;
  }

  /** Id of full block `index` of `tokens`, which must be the same tokens, or more, at every call. */
  id(index: number, tokens: ArrayLike<number>): BlockId {
    while (this.#ids.length <= index) {
      const begin = this.#ids.length * this.blockTokens;
      const block = sliceTokens(tokens, begin, begin + this.blockTokens);
      this.#ids.push(blockId(this.hash, this.#ids.at(-1) ?? this.root, block));
    }
    return this.#ids[index]!;
  }

  /** Id of the block that block `index` follows. */
  parent(index: number, tokens: ArrayLike<number>): BlockId {
    return index === 0 ? this.root : this.id(index - 1, tokens);
  }

  /** Id of an open block: tokens[index * blockTokens, end). */
  openId(index: number, tokens: ArrayLike<number>, end: number): BlockId {
    const open = sliceTokens(tokens, index * this.blockTokens, end);
    return blockId(this.hash, this.parent(index, tokens), open);
  }
}

export function sliceTokens(tokens: ArrayLike<number>, begin: number, end: number): Int32Array {
  const slice = new Int32Array(end - begin);
  for (let i = begin; i < end; i++) slice[i - begin] = tokens[i]!;
  return slice;
}
