// What the engine holds of the cache: a prompt that waits, and a sequence that was opened on what is cached.

import type { BlockChain } from "./block-chain.ts";
import type { BlockNumber } from "./block-pool.ts";
import type { CachedBlock } from "./cached-block.ts";
import type { LayerTransfer } from "./layer-transfer.ts";
import type { MissReason } from "./lost-blocks.ts";
import type { Keep, Waiter } from "./policy.ts";

/** Tokens of a prompt that need no computation, by the tier they came from. */
export interface CachedTokens {
  readonly gpu: number;
  readonly host: number;
  readonly disk: number;
}

/** The blocks of one sequence's view, in order; entry j holds positions [j * blockTokens, (j + 1) * blockTokens). */
export interface BlockTable {
  readonly chain: BlockChain;
  readonly blocks: BlockNumber[];
  /** Leading blocks that are full and that commit() has told the index of. */
  committedCount: number;
  /** Times that blocks have left the view. */
  drops: number;
  /** How its blocks wish to be kept. */
  readonly keep: Keep;
}

/** A prompt that waits for its turn. */
export interface QueuedPrompt {
  readonly chain: BlockChain;
  /** May grow while it waits: a preempted sequence has tokens on their way. */
  tokens: ArrayLike<number>;
  /** Most tokens to take from the cache: the rest is computed in any case. */
  limit: number;
  readonly keep: Keep;
  waiter: Waiter<CachedBlock> | null;
  /** Blocks that were read from disk for it. */
  readonly fetched: Set<CachedBlock>;
  /** When it stops waiting for them; null: it waits for none. */
  fetchDeadlineMs: number | null;
}

export interface OpenedSequence {
  readonly table: BlockTable;
  /** Tokens of the view whose KV is, or will be, in the table's blocks. */
  readonly length: number;
  readonly cached: CachedTokens;
  /** Copies still under way into the table's blocks. */
  readonly loads: readonly LayerTransfer[];
  readonly loadedBytes: number;
  readonly predictedLoadMs: number | null;
  readonly predictedRecomputeMs: number | null;
  readonly missReasons: ReadonlyMap<MissReason, number>;
}
