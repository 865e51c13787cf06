// The face that the engine sees: open a sequence on whatever prefix is cached, extend it block by block, commit what
// was computed so that others can share it, close it without losing anything.

import { assert } from "../assert.ts";
import { BlockChain, sliceTokens } from "./block-chain.ts";
import { type BlockHasher, type BlockId, rootId, sha256Hasher } from "./block-hash.ts";
import { type BlockNumber, BlockPool } from "./block-pool.ts";
import { ABSENT, type CachedBlock, PrefixIndex } from "./prefix-index.ts";

/** Tokens of a prompt that need no computation, by the tier they came from. */
export interface CachedTokens {
  readonly gpu: number;
  readonly host: number;
  readonly disk: number;
}

/** The blocks of one sequence, in order; entry j holds positions [j * blockTokens, (j + 1) * blockTokens). */
export interface BlockTable {
  readonly chain: BlockChain;
  readonly blocks: BlockNumber[];
  /** Leading blocks that are full and that commit() has told the index of. */
  committedCount: number;
}

export interface OpenedTable {
  readonly table: BlockTable;
  readonly cached: CachedTokens;
}

/** What the cache needs from a device; tests give a fake. */
export interface BlockCopier {
  copyBlocks(sources: Int32Array, destinations: Int32Array): void;
}

export interface KvCacheOptions {
  readonly blockTokens: number;
  readonly gpuBlocks: number;
  /** Everything that changes the numbers: weights, config, dtypes, layout, numeric mode. */
  readonly fingerprint: string;
  readonly hasher?: BlockHasher;
}

/** Counted since the start; one for each lookup, insertion or loss. */
export interface KvCacheStats {
  gpuBlocks: number;
  gpuBlocksAvailable: number;
  cachedBlocks: number;
  queriedTokens: number;
  hitTokens: number;
  evictedBlocks: number;
  copiedBlocks: number;
}

export class KvCache {
  readonly blockTokens: number;
  readonly #pool: BlockPool<CachedBlock>;
  readonly #index = new PrefixIndex();
  readonly #hash: BlockHasher;
  #queriedTokens = 0;
  #hitTokens = 0;
  #evictedBlocks = 0;
  #copiedBlocks = 0;

  constructor(
    readonly device: BlockCopier,
    readonly options: KvCacheOptions,
  ) {
    this.blockTokens = options.blockTokens;
    this.#hash = options.hasher ?? sha256Hasher;
    this.#pool = new BlockPool(options.gpuBlocks);
  }

  /** Ids for a new sequence of the account with this salt. */
  chain(salt: Uint8Array): BlockChain {
    const root = rootId(this.#hash, salt, this.options.fingerprint);
    return new BlockChain(root, this.blockTokens, this.#hash);
  }

  get availableBlocks(): number {
    return this.#pool.availableCount;
  }

  get blockCount(): number {
    return this.#pool.blockCount;
  }

  /** True when open() for `limit` tokens and extend() to `length` would both succeed now. */
  fits(chain: BlockChain, tokens: ArrayLike<number>, limit: number, length: number): boolean {
    let needed = Math.ceil(length / this.blockTokens);
    if (needed <= this.#pool.availableCount) return true;
    for (const block of this.#matchedBlocks(chain, tokens, limit)) {
      if (this.#pool.refCount(block.gpu) > 0) needed--;
    }
    return needed <= this.#pool.availableCount;
  }

  /** Starts a sequence of `tokens` on the longest cached prefix, at most `limit` tokens of it. */
  open(chain: BlockChain, tokens: ArrayLike<number>, limit: number): OpenedTable {
    const table: BlockTable = { chain, blocks: [], committedCount: 0 };
    for (const block of this.#matchedBlocks(chain, tokens, limit)) {
      this.#pool.retain(block.gpu);
      table.blocks.push(block.gpu);
    }
    table.committedCount = table.blocks.length;
    let matched = table.blocks.length * this.blockTokens;
    matched += this.#openPartialBlock(table, tokens, matched, limit);
    this.#queriedTokens += limit;
    this.#hitTokens += matched;
    return { table, cached: { gpu: matched, host: 0, disk: 0 } };
  }

  /** Makes room for `tokenCount` positions; false (and nothing changed) when there are not enough blocks. */
  extend(table: BlockTable, tokenCount: number): boolean {
    const missing = Math.ceil(tokenCount / this.blockTokens) - table.blocks.length;
    if (missing > this.#pool.availableCount) return false;
    for (let i = 0; i < missing; i++) table.blocks.push(this.#allocate());
    return true;
  }

  /**
   * Tells that positions [0, computed) of the table hold the KV of `tokens`: full blocks become findable. When two
   * sequences computed the same block, the first keeps the id and the second's copy stays its own.
   */
  commit(table: BlockTable, tokens: ArrayLike<number>, computed: number): void {
    const fullCount = Math.floor(computed / this.blockTokens);
    for (let j = table.committedCount; j < fullCount; j++) {
      const begin = j * this.blockTokens;
      const blockTokens = sliceTokens(tokens, begin, begin + this.blockTokens);
      const { chain } = table;
      this.#publish(table.blocks[j]!, chain.id(j, tokens), chain.parent(j, tokens), blockTokens);
    }
    table.committedCount = Math.max(table.committedCount, fullCount);
  }

  /** commit(), and the open last block becomes findable too, while the sequence may go on filling it. */
  commitOpen(table: BlockTable, tokens: ArrayLike<number>, computed: number): void {
    this.commit(table, tokens, computed);
    const index = table.committedCount;
    const begin = index * this.blockTokens;
    if (computed <= begin) return;
    const { chain } = table;
    const id = chain.openId(index, tokens, computed);
    const openTokens = sliceTokens(tokens, begin, computed);
    this.#publish(table.blocks[index]!, id, chain.parent(index, tokens), openTokens);
  }

  /** Ends the sequence. What was computed stays cached until its blocks are needed, the last block first. */
  close(table: BlockTable, tokens: ArrayLike<number>, computed: number): void {
    this.commitOpen(table, tokens, computed);
    for (let j = table.blocks.length - 1; j >= 0; j--) this.#pool.release(table.blocks[j]!);
    table.blocks.length = 0;
  }

  stats(): KvCacheStats {
    return {
      gpuBlocks: this.#pool.blockCount,
      gpuBlocksAvailable: this.#pool.availableCount,
      cachedBlocks: this.#index.size,
      queriedTokens: this.#queriedTokens,
      hitTokens: this.#hitTokens,
      evictedBlocks: this.#evictedBlocks,
      copiedBlocks: this.#copiedBlocks,
    };
  }

  /** Throws unless index and pool agree. For tests. */
  checkInvariants(): void {
    this.#pool.checkInvariants();
    const seen = new Set<BlockNumber>();
    for (const block of this.#index.blocks()) {
      assert(block.gpu !== ABSENT, "an indexed block is resident");
      assert(this.#pool.owner(block.gpu) === block, `block ${block.gpu} has another owner`);
      assert(!seen.has(block.gpu), `block ${block.gpu} has two names`);
      seen.add(block.gpu);
    }
  }

  /** The cached full blocks that `tokens` begins with, within its first `limit` tokens. */
  *#matchedBlocks(
    chain: BlockChain,
    tokens: ArrayLike<number>,
    limit: number,
  ): Generator<CachedBlock> {
    for (let begin = 0; begin + this.blockTokens <= limit; begin += this.blockTokens) {
      const id = chain.id(begin / this.blockTokens, tokens);
      const block = this.#index.find(id, tokens, begin, begin + this.blockTokens);
      if (block === null) return;
      yield block;
    }
  }

  /** Continues inside the child that shares most tokens: in place when nobody else needs it, else on a copy. */
  #openPartialBlock(
    table: BlockTable,
    tokens: ArrayLike<number>,
    begin: number,
    limit: number,
  ): number {
    const end = Math.min(limit, begin + this.blockTokens);
    const parent = table.chain.parent(table.blocks.length, tokens);
    const child = this.#index.longestChild(parent, tokens, begin, end);
    if (child === null) return 0;
    const { block, length } = child;
    const isFree = this.#pool.refCount(block.gpu) === 0;
    if (isFree && length === block.tokens.length && length < this.blockTokens) {
      this.#pool.retain(block.gpu);
      table.blocks.push(block.gpu);
      return length;
    }
    return this.#openOnCopy(table, block) ? length : 0;
  }

  #openOnCopy(table: BlockTable, source: CachedBlock): boolean {
    // Held while allocating, or the source itself might be the victim.
    this.#pool.retain(source.gpu);
    const canCopy = this.#pool.availableCount > 0;
    if (canCopy) {
      const copy = this.#allocate();
      this.device.copyBlocks(Int32Array.of(source.gpu), Int32Array.of(copy));
      this.#copiedBlocks++;
      table.blocks.push(copy);
    }
    this.#pool.release(source.gpu);
    return canCopy;
  }

  #allocate(): BlockNumber {
    const free = this.#pool.allocate();
    if (free !== null) return free;
    const victim = this.#pool.evictable().next();
    assert(!victim.done, "no block to evict");
    const owner = this.#pool.evict(victim.value);
    owner.gpu = ABSENT;
    this.#index.remove(owner);
    this.#evictedBlocks++;
    return this.#pool.allocate()!;
  }

  /** Makes gpu block `gpu` findable as `id`, unless one that says as much is known already. */
  #publish(gpu: BlockNumber, id: BlockId, parentId: BlockId, tokens: Int32Array): void {
    if (this.#index.has(id)) return;
    const owner = this.#pool.owner(gpu);
    if (owner !== null) {
      this.#index.rename(owner, id, tokens);
      return;
    }
    const block: CachedBlock = { id, parentId, tokens, gpu, host: ABSENT, disk: ABSENT };
    this.#index.insert(block);
    this.#pool.setOwner(gpu, block);
  }
}
