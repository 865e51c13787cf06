// A simulated conversation: its blocks of KV, which grow with every turn and lose their oldest half when
// the context window overflows. No bytes, only counts.

import { type BlockUse, newBlockUse } from "../kvcache/policy.ts";

export interface SimulatedBlock extends BlockUse {
  /** The block it continues; null: the first of its view. */
  parent: SimulatedBlock | null;
  /** Less than a block's worth in an open last block. */
  tokenCount: number;
  /** Running turns that use it, plus transfers under way. */
  pinCount: number;
  /** On its way from disk to host. */
  isReading: boolean;
  /** On its way from host to disk. */
  isWriting: boolean;
  /** The disk's copy lacks tokens that came later. */
  isDiskStale: boolean;
  /** Nobody will ever want it again. */
  isDropped: boolean;
  /** Told when the read is done. */
  readonly readers: (() => void)[];
}

export interface TruncationOptions {
  /** 0: none. */
  readonly contextTokens: number;
  readonly truncationRatio: number;
  /** Leading blocks that stay. */
  readonly truncationKeepBlocks: number;
}

export class Conversation {
  readonly blocks: SimulatedBlock[] = [];
  #nextDepth = 0;

  constructor(readonly blockTokens: number) {}

  get tokenCount(): number {
    return this.blocks.reduce((sum, block) => sum + block.tokenCount, 0);
  }

  /** Makes room for `comingTokens`; returns the blocks that left the view. */
  truncate(comingTokens: number, options: TruncationOptions): SimulatedBlock[] {
    const { contextTokens, truncationRatio, truncationKeepBlocks } = options;
    const dropCount = Math.max(1, Math.floor((contextTokens * truncationRatio) / this.blockTokens));
    const dropped: SimulatedBlock[] = [];
    if (contextTokens === 0) return dropped;
    while (this.tokenCount + comingTokens > contextTokens) {
      const batch = this.blocks.splice(truncationKeepBlocks, dropCount);
      if (batch.length === 0) break;
      dropped.push(...batch);
      const first = this.blocks[truncationKeepBlocks];
      if (first !== undefined) first.parent = this.blocks[truncationKeepBlocks - 1] ?? null;
    }
    return dropped;
  }

  /**
   * Forgets all but the first `keptTokens`; returns the blocks that went. The last one kept may have been
   * cut.
   */
  keep(keptTokens: number): SimulatedBlock[] {
    let left = keptTokens;
    for (let i = 0; i < this.blocks.length; i++) {
      const block = this.blocks[i]!;
      if (left <= 0) return this.blocks.splice(i);
      block.tokenCount = Math.min(block.tokenCount, left);
      left -= block.tokenCount;
    }
    return [];
  }

  /** The conversation grows; returns the blocks that are new or hold more than before, in order. */
  append(tokenCount: number): SimulatedBlock[] {
    const changed: SimulatedBlock[] = [];
    let left = tokenCount;
    while (left > 0) {
      let last = this.blocks.at(-1);
      if (last === undefined || last.tokenCount === this.blockTokens) {
        last = this.#newBlock(last ?? null);
        this.blocks.push(last);
      }
      const added = Math.min(left, this.blockTokens - last.tokenCount);
      last.tokenCount += added;
      left -= added;
      changed.push(last);
    }
    return changed;
  }

  #newBlock(parent: SimulatedBlock | null): SimulatedBlock {
    return {
      ...newBlockUse(this.#nextDepth++),
      parent,
      tokenCount: 0,
      pinCount: 0,
      isReading: false,
      isWriting: false,
      isDiskStale: false,
      isDropped: false,
      readers: [],
    };
  }
}
