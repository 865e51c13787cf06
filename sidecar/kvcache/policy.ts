// The cache policy: what to evict, what to demote, what to bring up, as the scheduler's queue sees the
// future (CachedAttention, USENIX ATC '24, 3.3). Pure: no I/O, no clock, no bytes. The server's three tiers
// and the trace simulator run this very module; "lru" and "fifo" are baselines behind the same calls.
//
// The cache tells it what happened (insert, retain, release, remove per tier; touch; enqueue, dequeue) and
// asks what to do (tier.next(), prefetch(), expire(), blocksToDemote()).

import type { BlockUse, Waiter } from "./block-use.ts";
import { IndexedHeap } from "./indexed-heap.ts";
import { LookaheadWindow } from "./lookahead-window.ts";
import { type PolicyName, VictimOrder } from "./victim-order.ts";

export type { PolicyName } from "./victim-order.ts";
export { type BlockUse, newBlockUse, type Waiter } from "./block-use.ts";

export const POLICY_NAMES: readonly PolicyName[] = ["scheduler-aware", "lru", "fifo"];

const EXPIRY_SLOT = 3;

export interface CachePolicyOptions {
  readonly policy: PolicyName;
  /** Budget of the eviction window: blocks of host and disk together (see evictionBudget). */
  readonly windowBlocks: number;
  /** By how much one level of priority makes a block look more recently used. */
  readonly priorityBonusMs?: number;
}

/** How a use of blocks wishes them kept. */
export interface Keep {
  /** Idle time after which they may be dropped, ms; default: never. */
  readonly ttlMs?: number;
  /** Soft: each level is worth `priorityBonusMs` of recency; default 0. */
  readonly priority?: number;
}

export class CachePolicy<Block extends BlockUse> {
  readonly gpu: VictimOrder<Block>;
  readonly host: VictimOrder<Block>;
  readonly disk: VictimOrder<Block>;
  /** Scheduler-aware only: the others do not look at the queue. */
  readonly #window: LookaheadWindow<Block> | null;
  readonly #expiry = new IndexedHeap<Block>(EXPIRY_SLOT, (a, b) => a.expiresAtMs < b.expiresAtMs);
  readonly #priorityBonusMs: number;

  constructor(readonly options: CachePolicyOptions) {
    const { policy, windowBlocks } = options;
    this.gpu = new VictimOrder<Block>(policy, 0);
    this.host = new VictimOrder<Block>(policy, 1);
    this.disk = new VictimOrder<Block>(policy, 2);
    this.#priorityBonusMs = options.priorityBonusMs ?? 600_000;
    const isAware = policy === "scheduler-aware";
    this.#window = isAware ? new LookaheadWindow<Block>(windowBlocks, (block) => this.#reorder(block)) : null;
  }

  /** Distinct blocks inside the eviction window. */
  get windowCount(): number {
    return this.#window?.insideCount ?? 0;
  }

  /** Some block will expire. */
  get hasMortals(): boolean {
    return this.#expiry.size > 0;
  }

  /**
   * A sequence waits at the end of the queue. `blocks`: the cached blocks of its prompt, first block first.
   */
  enqueue(blocks: readonly Block[]): Waiter<Block> {
    return this.#window?.append(blocks) ?? NO_WAITER;
  }

  /** A preempted sequence waits at the head of the queue. */
  requeue(blocks: readonly Block[]): Waiter<Block> {
    return this.#window?.prepend(blocks) ?? NO_WAITER;
  }

  /** Other blocks of a waiting sequence's prompt are cached now. */
  replace(waiter: Waiter<Block>, blocks: readonly Block[]): void {
    this.#window?.replace(waiter, blocks);
  }

  /** The sequence runs now (its blocks are to be retained first), or was aborted. */
  dequeue(waiter: Waiter<Block>): void {
    this.#window?.remove(waiter);
  }

  /**
   * The blocks of one sequence were used. What several conversations share lives as long as the longest of
   * them asks. Give whole chains, so that a prefix is never less recent than what hangs on it.
   */
  touch(blocks: Iterable<Block>, nowMs: number, { ttlMs = Infinity, priority = 0 }: Keep = {}): void {
    const recencyMs = nowMs + priority * this.#priorityBonusMs;
    for (const block of blocks) {
      this.#extendLife(block, nowMs + ttlMs);
      if (recencyMs <= block.recencyMs) continue;
      block.recencyMs = recencyMs;
      this.#reorder(block);
    }
  }

  /** The block has left its last tier. */
  forget(block: Block): void {
    this.#window?.forget(block);
    if (this.#expiry.has(block)) this.#expiry.remove(block);
  }

  /**
   * Idle blocks whose time is over: no one waits for them, no tier has them pinned. To be dropped from all
   * tiers.
   */
  expire(nowMs: number): Block[] {
    const expired: Block[] = [];
    const busy: Block[] = [];
    for (let block = this.#expiry.peek(); block !== null; block = this.#expiry.peek()) {
      if (block.expiresAtMs > nowMs) break;
      this.#expiry.remove(block);
      (this.#isBusy(block) ? busy : expired).push(block);
    }
    for (const block of busy) this.#expiry.add(block);
    return expired;
  }

  /**
   * Blocks to read from disk into host memory now, head of the queue first, at most `limit`. `windowBlocks`
   * is the prefetch window (see prefetchBudget). Costs O(blocks in the window); nothing for lru and fifo.
   */
  prefetch(windowBlocks: number, limit: number, isWanted: (block: Block) => boolean): Block[] {
    const wanted: Block[] = [];
    if (this.#window === null || limit <= 0) return wanted;
    this.#window.walk(windowBlocks, (block) => {
      if (isWanted(block)) wanted.push(block);
      return wanted.length < limit;
    });
    return wanted;
  }

  /** For tests. */
  checkInvariants(): void {
    for (const tier of [this.gpu, this.host, this.disk]) tier.checkInvariants();
    this.#expiry.checkInvariants();
  }

  #reorder(block: Block): void {
    this.gpu.reorder(block);
    this.host.reorder(block);
    this.disk.reorder(block);
  }

  #extendLife(block: Block, expiresAtMs: number): void {
    if (expiresAtMs <= block.expiresAtMs) return;
    block.expiresAtMs = expiresAtMs;
    const isMortal = expiresAtMs !== Infinity;
    if (!this.#expiry.has(block)) {
      if (isMortal) this.#expiry.add(block);
    } else if (isMortal) this.#expiry.update(block);
    else this.#expiry.remove(block);
  }

  #isBusy(block: Block): boolean {
    if (block.waiters.length > 0) return true;
    return this.gpu.isPinned(block) || this.host.isPinned(block) || this.disk.isPinned(block);
  }
}

const NO_WAITER: Waiter<never> = Object.freeze({ ticket: 0, blocks: [] });

/** Blocks that the eviction window spans: what host and disk hold together. */
export function evictionBudget(hostBlocks: number, diskBlocks: number): number {
  return hostBlocks + diskBlocks;
}

/**
 * Blocks that the prefetch window spans: what host memory can offer to waiting sequences. Blocks of the
 * window that are in host memory already count too, and `reserveBlocks` must be at least the high
 * watermark: else the background would write down the window's tail and the prefetch bring it up again, for
 * ever.
 */
export function prefetchBudget(hostBlocks: number, pinnedBlocks: number, reserveBlocks: number): number {
  return Math.max(0, hostBlocks - pinnedBlocks - reserveBlocks);
}

export interface Watermarks {
  /** Demotion starts when fewer blocks are free. */
  readonly lowBlocks: number;
  /** It frees up to this many. */
  readonly highBlocks: number;
}

/** How many blocks to demote now, given those free and those that demotions under way will free. */
export function blocksToDemote(freeBlocks: number, freeingBlocks: number, marks: Watermarks): number {
  const soonFree = freeBlocks + freeingBlocks;
  return soonFree >= marks.lowBlocks ? 0 : marks.highBlocks - soonFree;
}

/**
 * The paper's windows in sequences: L_pw = C_mem / S_kv with `tierBytes` = C_mem, L_ev = (C_mem + C_disk) /
 * S_kv with the sum. Printed beside what the block-exact windows hold.
 */
export function paperWindow(tierBytes: number, meanSequenceBytes: number): number {
  return meanSequenceBytes > 0 ? Math.floor(tierBytes / meanSequenceBytes) : 0;
}
