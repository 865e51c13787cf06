// One block's KV: what it means, and where copies of it lie.

import type { BlockName } from "./block-chain.ts";
import type { BlockId } from "./block-hash.ts";
import type { BlockNumber } from "./block-pool.ts";
import { type BlockUse, newBlockUse } from "./block-use.ts";
import type { LayerTransfer } from "./layer-transfer.ts";

/** Not resident in that tier. */
export const ABSENT = -1;

/** A copy in host memory: being written by a save or a read, adopted but not yet verified, or good. */
export type HostState = "arriving" | "unverified" | "ready";

export interface CachedBlock extends BlockUse {
  id: BlockId;
  readonly parentId: BlockId;
  readonly prefixCheck: bigint;
  /** Its token ids; fewer than a block's worth when it is the open last block of a conversation. */
  tokens: Int32Array;
  gpu: BlockNumber;
  /** The copy into its gpu block that is still under way. */
  gpuLoad: LayerTransfer | null;
  host: BlockNumber;
  hostState: HostState;
  disk: BlockNumber;
  /** The copy on disk is whole. */
  isDiskReady: boolean;
  /** Sequences that opened on it: a second one shows that it is worth a place on disk. */
  useCount: number;
}

export function newCachedBlock(name: BlockName, tokens: Int32Array, depth: number): CachedBlock {
  return {
    ...name,
    ...newBlockUse(depth),
    tokens,
    gpu: ABSENT,
    gpuLoad: null,
    host: ABSENT,
    hostState: "arriving",
    disk: ABSENT,
    isDiskReady: false,
    useCount: 0,
  };
}

export function isHostReady(block: CachedBlock): boolean {
  return block.host !== ABSENT && block.hostState !== "arriving";
}

/** A copy from which the block can be had, now or after a load or read. */
export function isResident(block: CachedBlock): boolean {
  return block.gpu !== ABSENT || isHostReady(block) || (block.disk !== ABSENT && block.isDiskReady);
}
