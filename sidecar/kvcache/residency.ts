// Where each block lies: gpu blocks, host slots, disk slots; who takes a place and who loses it. The copies between
// the tiers are block-moves.ts.

import { assert } from "../assert.ts";
import type { BlockName } from "./block-chain.ts";
import type { BlockHeader } from "./block-header.ts";
import { type BlockNumber, BlockPool } from "./block-pool.ts";
import { ABSENT, type CachedBlock, isHostReady, isResident, newCachedBlock } from "./cached-block.ts";
import { DirtyBlocks } from "./dirty-blocks.ts";
import type { DiskTier } from "./disk-tier.ts";
import type { HostTier } from "./host-tier.ts";
import { LostBlocks, type MissReason } from "./lost-blocks.ts";
import type { CachePolicy } from "./policy.ts";
import { PrefixIndex } from "./prefix-index.ts";

export interface ResidencyOptions {
  readonly layers: number;
  readonly gpuBlocks: number;
  /** Bytes of one block. */
  readonly blockBytes: number;
  /**
   * gpu and host are the same memory (CPU library): a block lies in one of them, moves up and down, and is saved only
   * when it has to leave the gpu tier. Otherwise what is computed is written through to host memory.
   */
  readonly isExclusive: boolean;
  /** Blocks go to disk by themselves only when they were used again. */
  readonly wantsSecondUse: boolean;
}

/** Copies whole gpu blocks, in the compute stream's order. */
export interface BlockCopier {
  copyBlocks(sources: Int32Array, destinations: Int32Array): void;
}

/** Tiers below the gpu; null: there is none. */
export interface LowerTiers {
  readonly host: HostTier | null;
  readonly disk: DiskTier | null;
}

const LOST_CAPACITY = 65_536;

export class Residency {
  readonly index = new PrefixIndex();
  readonly lost = new LostBlocks(LOST_CAPACITY);
  readonly gpu: BlockPool<CachedBlock>;
  readonly dirty: DirtyBlocks;
  readonly counters = {
    evictedGpuBlocks: 0,
    copiedBlocks: 0,
    evictedHostBlocks: 0,
    evictedDiskBlocks: 0,
    loadedBlocks: 0,
    savedBlocks: 0,
    skippedSaves: 0,
    readBlocks: 0,
    writtenBlocks: 0,
    quarantinedSlots: 0,
  };
  /** Leave host memory as soon as they are on disk. */
  readonly leaving = new Set<CachedBlock>();
  /** Leave the gpu as soon as they are saved. */
  readonly descending = new Set<CachedBlock>();
  /** Step after which nothing enqueued touches a gpu block any more. */
  readonly #lastStep: Float64Array;
  #stepsEnqueued = 0;
  #stepsCompleted = 0;

  constructor(
    readonly device: BlockCopier,
    readonly policy: CachePolicy<CachedBlock>,
    readonly tiers: LowerTiers,
    readonly options: ResidencyOptions,
  ) {
    this.gpu = new BlockPool(options.gpuBlocks, policy.gpu);
    this.dirty = new DirtyBlocks(options.wantsSecondUse);
    this.#lastStep = new Float64Array(options.gpuBlocks);
  }

  noteStepEnqueued(): void {
    this.#stepsEnqueued++;
  }

  noteStepCompleted(): void {
    this.#stepsCompleted++;
  }

  // ---- gpu blocks

  /** A gpu block in use by the caller, at the cost of the least needed cached one; null: all are in use. */
  takeGpu(): BlockNumber | null {
    const free = this.gpu.allocate();
    if (free !== null) return free;
    const victim = this.gpu.victim();
    if (victim === null) return null;
    this.counters.evictedGpuBlocks++;
    this.leaveGpu(victim, "evicted");
    return this.gpu.allocate();
  }

  /** One user fewer; steps enqueued so far may still touch the block. */
  releaseGpu(block: BlockNumber): void {
    this.#lastStep[block] = Math.max(this.#lastStep[block]!, this.#stepsEnqueued);
    this.gpu.release(block);
  }

  /** A step that is not completed may touch the block. */
  isTouched(block: BlockNumber): boolean {
    return this.#lastStep[block]! > this.#stepsCompleted;
  }

  /** Copies a whole block, in the compute stream's order: it is done when the next step is. */
  copyGpu(source: BlockNumber, destination: BlockNumber): void {
    this.device.copyBlocks(Int32Array.of(source), Int32Array.of(destination));
    for (const block of [source, destination]) this.#lastStep[block] = this.#stepsEnqueued + 1;
    this.counters.copiedBlocks++;
  }

  leaveGpu(block: CachedBlock, reason: MissReason): void {
    this.gpu.disown(block.gpu);
    block.gpu = ABSENT;
    block.gpuLoad = null;
    this.descending.delete(block);
    this.forgetIfLost(block, reason);
  }

  /** The gpu block, in use by the caller, holds this block's KV from now on (in the compute stream's order). */
  publish(block: CachedBlock, gpu: BlockNumber, nowMs: number): void {
    if (!this.index.has(block.id)) this.index.insert(block);
    this.lost.found(block.id);
    this.gpu.setOwner(gpu, block, this.parent(block));
    block.gpu = gpu;
    if (block.disk === ABSENT) this.markDirty(block, nowMs);
  }

  /** An open block has received more tokens in its gpu block: copies below hold less than its new name says. */
  rename(block: CachedBlock, name: BlockName, tokens: Int32Array, nowMs: number): void {
    this.leaveHost(block);
    this.leaveDisk(block, nowMs);
    this.index.rename(block, name.id, tokens);
    this.lost.found(name.id);
    this.markDirty(block, nowMs);
  }

  /** Blocks were used: they are idle from now on anew. */
  touched(blocks: readonly CachedBlock[], nowMs: number): void {
    for (const block of blocks) this.dirty.touch(block, nowMs);
  }

  /** A block that an earlier process left in a slot of host memory or on disk, which is in use by the caller. */
  adopt(header: BlockHeader, tier: "host" | "disk", slot: BlockNumber, nowMs: number): void {
    const { pool } = tier === "host" ? this.#host : this.tiers.disk!;
    const known = this.index.get(header.id);
    const isTwin = known !== null && (known.prefixCheck !== header.prefixCheck || known[tier] !== ABSENT);
    if (isTwin) {
      pool.release(slot);
      return;
    }
    const block = known ?? newCachedBlock(header, header.tokens, header.depth);
    if (known === null) this.index.insert(block);
    pool.setOwner(slot, block, this.parent(block));
    block[tier] = slot;
    if (tier === "disk") block.isDiskReady = true;
    else block.hostState = "unverified";
    // A clock that was set back must not leave blocks that are younger than all to come.
    const usedAtMs = Math.min(header.lastUsedAtMs, nowMs);
    this.policy.touch([block], usedAtMs, { ttlMs: header.expiresAtMs - header.lastUsedAtMs });
    pool.release(slot);
    if (block.isDiskReady) this.dirty.delete(block);
    else this.markDirty(block, usedAtMs);
  }

  /** The host copy may be used. An adopted one is checked now; when it is not whole it is lost. */
  verify(block: CachedBlock): boolean {
    if (!isHostReady(block)) return false;
    if (block.hostState === "ready") return true;
    if (this.#host.verify(block.host)) {
      block.hostState = "ready";
      return true;
    }
    this.leaveHost(block);
    this.forgetIfLost(block, "corrupt");
    return false;
  }

  evictHost(block: CachedBlock): void {
    this.counters.evictedHostBlocks++;
    this.leaveHost(block);
    this.forgetIfLost(block, "evicted");
  }

  /** Removes the block from all tiers; on disk its header is emptied. Returns where it was. */
  drop(block: CachedBlock, reason: MissReason, nowMs: number): ("gpu" | "host" | "disk")[] {
    const places: ("gpu" | "host" | "disk")[] = [];
    if (block.disk !== ABSENT) {
      this.leaveDisk(block, nowMs);
      places.push("disk");
    }
    if (block.host !== ABSENT) {
      this.leaveHost(block);
      places.push("host");
    }
    if (block.gpu !== ABSENT) {
      this.leaveGpu(block, reason);
      places.push("gpu");
    }
    this.forgetIfLost(block, reason);
    return places;
  }

  /** Throws unless blocks and pools agree. For tests. */
  checkInvariants(): void {
    this.gpu.checkInvariants();
    this.tiers.host?.pool.checkInvariants();
    this.policy.checkInvariants();
    for (const block of this.index.blocks()) {
      const isArriving = block.host !== ABSENT || block.disk !== ABSENT;
      assert(isResident(block) || isArriving, "an indexed block is somewhere");
      if (block.gpu !== ABSENT) assert(this.gpu.owner(block.gpu) === block, "its gpu block is another's");
      if (block.host !== ABSENT) {
        assert(this.#host.pool.owner(block.host) === block, "its host slot is another's");
      }
      if (block.disk !== ABSENT) {
        assert(this.tiers.disk!.pool.owner(block.disk) === block, "its disk slot is another's");
      }
    }
    for (const [block] of this.dirty.all()) {
      assert(this.index.get(block.id) === block, "a block to be written is findable");
      assert(block.disk === ABSENT, "a block to be written has no copy on disk, and none is being written");
    }
  }

  get #host(): HostTier {
    return this.tiers.host!;
  }

  /** The block that it continues, if that is known. */
  parent(block: CachedBlock): CachedBlock | null {
    return this.index.get(block.parentId);
  }

  /** It has no copy on disk. */
  markDirty(block: CachedBlock, nowMs: number): void {
    if (this.tiers.disk !== null) this.dirty.add(block, nowMs);
  }

  /** takeHost() would return a slot. */
  get hasHostRoom(): boolean {
    return this.tiers.host !== null && (this.#host.pool.freeCount > 0 || this.#spareHost() !== null);
  }

  /** A free host slot, or that of a victim which loses nothing by it. */
  takeHost(): BlockNumber | null {
    if (this.tiers.host === null) return null;
    const free = this.#host.allocate();
    if (free !== null) return free;
    const spare = this.#spareHost();
    if (spare === null) return null;
    this.evictHost(spare);
    return this.#host.allocate();
  }

  /** The next victim of host memory, if it lies elsewhere, too. */
  #spareHost(): CachedBlock | null {
    const victim = this.#host.pool.victim();
    if (victim === null) return null;
    return victim.isDiskReady || (this.options.isExclusive && victim.gpu !== ABSENT) ? victim : null;
  }

  /** A free disk slot, or that of a victim worth less than `block`. */
  takeDisk(block: CachedBlock): BlockNumber | null {
    const { pool } = this.tiers.disk!;
    const free = pool.allocate();
    if (free !== null) return free;
    const victim = pool.victim();
    if (victim === null || !pool.order.isWorthReplacing(block)) return null;
    this.counters.evictedDiskBlocks++;
    pool.disown(victim.disk);
    victim.disk = ABSENT;
    victim.isDiskReady = false; // nor is it written again for being idle: that could go on for ever
    this.forgetIfLost(victim, "evicted");
    return pool.allocate();
  }

  /** A move under way keeps the slot until it has ended. */
  leaveHost(block: CachedBlock): void {
    if (block.host === ABSENT) return;
    this.#host.disown(block);
    block.host = ABSENT;
    this.leaving.delete(block);
    this.descending.delete(block);
  }

  /** Its header on disk is emptied, at once or when the move under way has ended. */
  leaveDisk(block: CachedBlock, nowMs: number): void {
    if (block.disk === ABSENT) return;
    const { pool } = this.tiers.disk!;
    const slot = block.disk;
    block.disk = ABSENT;
    block.isDiskReady = false;
    if (pool.refCount(slot) > 0) {
      pool.disown(slot); // a move is under way: it erases the slot when it has ended
      this.tiers.disk!.condemn(slot);
      return;
    }
    pool.retain(slot);
    pool.disown(slot);
    this.tiers.disk!.erase(slot, nowMs);
  }

  /** Without a place in any tier it is not findable any more. */
  forgetIfLost(block: CachedBlock, reason: MissReason): void {
    if (block.gpu !== ABSENT || block.host !== ABSENT || block.disk !== ABSENT) return;
    if (this.index.get(block.id) !== block) return;
    this.index.remove(block);
    this.policy.forget(block);
    this.dirty.delete(block);
    this.lost.note(block.id, reason);
  }
}
