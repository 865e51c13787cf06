// What the cache policy knows about one block: when it was used, and who waits for it. A cache's own record
// of a block carries these fields (spread newBlockUse() into it), so that the policy needs no table of its
// own.

import type { HeapItem } from "./indexed-heap.ts";

/** `neededAt` of a block that no sequence inside the look-ahead window needs. */
export const OUTSIDE_WINDOW = Infinity;

/** A waiting sequence: its place in the queue, and the cached blocks of its prompt. */
export interface Waiter<Block> {
  /** Lower runs earlier. */
  readonly ticket: number;
  /** First block of the prompt first. */
  readonly blocks: readonly Block[];
}

export interface BlockUse extends HeapItem {
  /** Place in its conversation: 0 is the first block. A suffix is evicted before the prefix it hangs on. */
  readonly depth: number;
  /** When it was last used, plus what its priority is worth, ms. */
  recencyMs: number;
  /** When its idle time is over, ms. */
  expiresAtMs: number;
  /** Waiting sequences that need it, the next to run first. The first one is charged for it. */
  readonly waiters: Waiter<BlockUse>[];
  /** Ticket of the first of them if that lies inside the look-ahead window, else OUTSIDE_WINDOW. */
  neededAt: number;
  /** Per tier, the order in which it came in; 0: not resident there. */
  readonly enteredAt: number[];
}

export function newBlockUse(depth: number): BlockUse {
  return {
    depth,
    recencyMs: -Infinity,
    expiresAtMs: -Infinity,
    waiters: [],
    neededAt: OUTSIDE_WINDOW,
    enteredAt: [0, 0, 0],
    heapIndexes: [-1, -1, -1, -1],
  };
}
