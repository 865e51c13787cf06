// Where each block lies and how it moves: gpu blocks, host slots, disk slots, and the copies between them. Everything
// is started here and ends in poll(); nothing waits. A move holds the places it copies between until it has ended, and
// when it ends it looks whether the block still owns them: a block may be dropped or renamed meanwhile.

import { assert } from "../assert.ts";
import type { EventHandle } from "../native.ts";
import type { BlockName } from "./block-chain.ts";
import type { BlockHeader } from "./block-header.ts";
import { type BlockNumber, BlockPool } from "./block-pool.ts";
import { ABSENT, type CachedBlock, isHostReady, isResident, newCachedBlock } from "./cached-block.ts";
import type { DiskTier, EndedMove } from "./disk-tier.ts";
import type { HostTier } from "./host-tier.ts";
import { type CopyDevice, EventPool, LayerTransfer } from "./layer-transfer.ts";
import { LostBlocks, type MissReason } from "./lost-blocks.ts";
import type { CachePolicy } from "./policy.ts";
import { PrefixIndex } from "./prefix-index.ts";
import { RateMeter } from "./rate-meter.ts";

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
}

/** What the cache needs from a device; tests give a fake. */
export interface KvDevice extends CopyDevice {
  /** Whole gpu blocks, in the compute stream's order. */
  copyBlocks(sources: Int32Array, destinations: Int32Array): void;
}

/** Tiers below the gpu; null: there is none. */
export interface LowerTiers {
  readonly host: HostTier | null;
  readonly disk: DiskTier | null;
}

interface Load {
  readonly transfer: LayerTransfer;
  readonly blocks: readonly CachedBlock[];
}

interface Save {
  readonly transfer: LayerTransfer;
  readonly blocks: readonly CachedBlock[];
  /** Copies of layer i may start: the compute stream has that layer's KV. */
  isOrdered: boolean;
}

const LOST_CAPACITY = 65_536;

export class Residency {
  readonly index = new PrefixIndex();
  readonly lost = new LostBlocks(LOST_CAPACITY);
  readonly gpu: BlockPool<CachedBlock>;
  readonly loadRate = new RateMeter();
  readonly readRate = new RateMeter();
  /** Findable blocks without a copy on disk, and when they were last used, ms; the longest idle first. */
  readonly dirty = new Map<CachedBlock, number>();
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
  readonly #events: EventPool;
  /** Marks a point of the compute stream for the copy streams to wait for; recorded anew each time. */
  readonly #computePoint: EventHandle;
  #loads: Load[] = [];
  #saves: Save[] = [];
  /** Step after which nothing enqueued touches a gpu block any more. */
  readonly #lastStep: Float64Array;
  #stepsEnqueued = 0;
  #stepsCompleted = 0;
  /** Leave host memory as soon as they are on disk. */
  readonly #leaving = new Set<CachedBlock>();
  /** Leave the gpu as soon as they are saved. */
  readonly #descending = new Set<CachedBlock>();

  constructor(
    readonly device: KvDevice,
    readonly policy: CachePolicy<CachedBlock>,
    readonly tiers: LowerTiers,
    readonly options: ResidencyOptions,
  ) {
    this.gpu = new BlockPool(options.gpuBlocks, policy.gpu);
    this.#events = new EventPool(device);
    this.#computePoint = device.createEvent();
    this.#lastStep = new Float64Array(options.gpuBlocks);
  }

  /** Moves that have not ended. */
  get movesInFlight(): number {
    return this.#loads.length + this.#saves.length + (this.tiers.disk?.operationCount ?? 0);
  }

  get leavingCount(): number {
    return this.#leaving.size;
  }

  get descendingCount(): number {
    return this.#descending.size;
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
    this.#descending.delete(block);
    this.#forgetIfLost(block, reason);
  }

  /** The gpu block, in use by the caller, holds this block's KV from now on (in the compute stream's order). */
  publish(block: CachedBlock, gpu: BlockNumber, nowMs: number): void {
    if (!this.index.has(block.id)) this.index.insert(block);
    this.lost.found(block.id);
    this.gpu.setOwner(gpu, block, this.#parent(block));
    block.gpu = gpu;
    if (!block.isDiskReady) this.#markDirty(block, nowMs);
  }

  /** An open block has received more tokens in its gpu block: copies below hold less than its new name says. */
  rename(block: CachedBlock, name: BlockName, tokens: Int32Array, nowMs: number): void {
    this.#leaveHost(block);
    this.#leaveDisk(block, nowMs);
    this.index.rename(block, name.id, tokens);
    this.lost.found(name.id);
    this.#markDirty(block, nowMs);
  }

  /** Blocks were used: they are idle from now on anew. */
  touched(blocks: readonly CachedBlock[], nowMs: number): void {
    for (const block of blocks) {
      if (this.dirty.delete(block)) this.dirty.set(block, nowMs);
    }
  }

  /** A block that an earlier process left in a slot of host memory or on disk, which is in use by the caller. */
  adopt(header: BlockHeader, tier: "host" | "disk", slot: BlockNumber): void {
    const { pool } = tier === "host" ? this.#host : this.tiers.disk!;
    const known = this.index.get(header.id);
    const isTwin = known !== null && (known.prefixCheck !== header.prefixCheck || known[tier] !== ABSENT);
    if (isTwin) {
      pool.release(slot);
      return;
    }
    const block = known ?? newCachedBlock(header, header.tokens, header.depth);
    if (known === null) this.index.insert(block);
    pool.setOwner(slot, block, this.#parent(block));
    block[tier] = slot;
    if (tier === "disk") block.isDiskReady = true;
    else block.hostState = "unverified";
    this.policy.touch([block], header.lastUsedAtMs, { ttlMs: header.expiresAtMs - header.lastUsedAtMs });
    pool.release(slot);
    if (block.isDiskReady) this.dirty.delete(block);
    else this.#markDirty(block, header.lastUsedAtMs);
  }

  // ---- moves

  /**
   * Copies blocks that are ready in host memory into gpu blocks, both in use by the caller until this returns. Entries
   * of `owned` become the block's own place; the others are private copies.
   */
  load(
    blocks: readonly CachedBlock[],
    gpuBlocks: readonly BlockNumber[],
    owned: readonly boolean[],
    nowMs: number,
  ): LayerTransfer {
    const hostSlots = Int32Array.from(blocks, ({ host }) => host);
    const transfer = new LayerTransfer(
      this.device, this.#events, "load", hostSlots, Int32Array.from(gpuBlocks), this.options.layers, nowMs,
    );
    blocks.forEach((block, i) => {
      const gpu = gpuBlocks[i]!;
      assert(isHostReady(block), "only what is ready in host memory can be loaded");
      this.#host.pool.retain(block.host);
      this.gpu.retain(gpu);
      if (!owned[i]) return;
      this.gpu.setOwner(gpu, block, this.#parent(block));
      block.gpu = gpu;
      block.gpuLoad = transfer;
    });
    if (gpuBlocks.some((gpu) => this.#lastStep[gpu]! > this.#stepsCompleted)) this.#orderBehindCompute("load");
    this.#loads.push({ transfer, blocks });
    transfer.pump();
    return transfer;
  }

  /**
   * Copies blocks from the gpu into host slots, as many as find room. Ordered behind what the compute stream has now,
   * or layer by layer behind the step that is enqueued next (afterLayer). Returns those into which a load is still under
   * way: they can be saved when it has ended.
   */
  save(blocks: readonly CachedBlock[], order: "now" | "by-layer", nowMs: number): CachedBlock[] {
    const chosen: CachedBlock[] = [];
    const later: CachedBlock[] = [];
    for (const block of blocks) {
      if (block.host !== ABSENT || block.gpu === ABSENT) continue;
      if (block.gpuLoad !== null) {
        later.push(block);
        continue;
      }
      const slot = this.#takeHost();
      if (slot === null) {
        this.counters.skippedSaves++;
        continue;
      }
      this.#host.pool.setOwner(slot, block, this.#parent(block));
      block.host = slot;
      block.hostState = "arriving";
      this.gpu.retain(block.gpu);
      chosen.push(block);
    }
    if (chosen.length === 0) return later;
    const hostSlots = Int32Array.from(chosen, ({ host }) => host);
    const gpuBlocks = Int32Array.from(chosen, ({ gpu }) => gpu);
    const transfer = new LayerTransfer(
      this.device, this.#events, "save", hostSlots, gpuBlocks, this.options.layers, nowMs,
    );
    if (order === "now") this.#orderBehindCompute("save");
    this.#saves.push({ transfer, blocks: chosen, isOrdered: order === "now" });
    if (order === "now") transfer.pump();
    return later;
  }

  /** A step's layer is enqueued: the saves that wait for it may copy that layer. */
  afterLayer(layer: number): void {
    const waiting = this.#saves.filter(({ isOrdered }) => !isOrdered);
    if (waiting.length === 0) return;
    this.#orderBehindCompute("save");
    for (const save of waiting) {
      save.transfer.pump(layer + 1);
      if (layer + 1 === this.options.layers) save.isOrdered = true;
    }
  }

  /** Starts reading a block from disk into host memory; false: no room, or nothing to read. */
  read(block: CachedBlock, nowMs: number): boolean {
    const { disk } = this.tiers;
    if (disk === null || block.disk === ABSENT || !block.isDiskReady || block.host !== ABSENT) return false;
    const hostSlot = this.#takeHost();
    if (hostSlot === null) return false;
    this.#host.pool.setOwner(hostSlot, block, this.#parent(block));
    block.host = hostSlot;
    block.hostState = "arriving";
    disk.pool.retain(block.disk);
    disk.read({ block, hostSlot, diskSlot: block.disk }, this.#host.address(hostSlot), nowMs);
    return true;
  }

  /** Starts writing a block from host memory to disk; false: the disk holds nothing worth less. */
  write(block: CachedBlock, nowMs: number): boolean {
    const { disk } = this.tiers;
    if (disk === null || block.disk !== ABSENT || !this.verify(block)) return false;
    const diskSlot = this.#takeDisk(block);
    if (diskSlot === null) {
      this.dirty.delete(block); // it would be refused again and again
      return false;
    }
    disk.pool.setOwner(diskSlot, block, this.#parent(block));
    block.disk = diskSlot;
    block.isDiskReady = false;
    this.dirty.delete(block);
    this.#host.pool.retain(block.host);
    disk.write({ block, hostSlot: block.host, diskSlot }, this.#host.address(block.host), nowMs);
    return true;
  }

  /** The host copy may be used. An adopted one is checked now; when it is not whole it is lost. */
  verify(block: CachedBlock): boolean {
    if (!isHostReady(block)) return false;
    if (block.hostState === "ready") return true;
    if (this.#host.verify(block.host)) {
      block.hostState = "ready";
      return true;
    }
    this.#leaveHost(block);
    this.#forgetIfLost(block, "corrupt");
    return false;
  }

  /** Leaves host memory when its copy on disk is whole (at once, if it is already). */
  demote(block: CachedBlock): void {
    if (block.isDiskReady && this.#host.pool.refCount(block.host) === 0) this.evictHost(block);
    else this.#leaving.add(block);
  }

  evictHost(block: CachedBlock): void {
    this.counters.evictedHostBlocks++;
    this.#leaveHost(block);
    this.#forgetIfLost(block, "evicted");
  }

  /**
   * Exclusive tiers: before blocks are taken, those in the way move down. False: they are on their way, ask again.
   * True: so many are free, or more can only be had by losing what they hold.
   */
  clearGpu(count: number, nowMs: number): boolean {
    if (!this.options.isExclusive || this.tiers.host === null) return true;
    while (this.gpu.freeCount + this.#descending.size < count) {
      const victim = this.gpu.victim();
      if (victim === null) break;
      if (isHostReady(victim) || victim.isDiskReady) this.leaveGpu(victim, "evicted");
      else {
        this.descend([victim], nowMs);
        if (victim.host === ABSENT) break; // no room below
      }
    }
    return this.gpu.freeCount >= count || this.#descending.size === 0;
  }

  /** Saves the block and then takes it off the gpu (exclusive tiers). */
  descend(blocks: readonly CachedBlock[], nowMs: number): void {
    for (const block of blocks) this.#descending.add(block);
    this.save(blocks, "now", nowMs);
    for (const block of blocks) if (block.host === ABSENT) this.#descending.delete(block);
  }

  /** Removes the block from all tiers; on disk its header is emptied. Returns where it was. */
  drop(block: CachedBlock, reason: MissReason, nowMs: number): ("gpu" | "host" | "disk")[] {
    const places: ("gpu" | "host" | "disk")[] = [];
    if (block.disk !== ABSENT) {
      this.#leaveDisk(block, nowMs);
      places.push("disk");
    }
    if (block.host !== ABSENT) {
      this.#leaveHost(block);
      places.push("host");
    }
    if (block.gpu !== ABSENT) {
      this.leaveGpu(block, reason);
      places.push("gpu");
    }
    this.#forgetIfLost(block, reason);
    return places;
  }

  /** Learns what has ended, and goes on with what the streams had no room for. */
  poll(nowMs: number): void {
    for (const { transfer } of this.#loads) transfer.pump();
    for (const { transfer, isOrdered } of this.#saves) if (isOrdered) transfer.pump();
    this.#loads = this.#loads.filter((load) => !this.#endLoad(load, nowMs));
    this.#saves = this.#saves.filter((save) => !this.#endSave(save));
    for (const move of this.tiers.disk?.poll(nowMs) ?? []) {
      if (move.kind === "read") this.#endRead(move, nowMs);
      else this.#endWrite(move, nowMs);
    }
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
  }

  get #host(): HostTier {
    return this.tiers.host!;
  }

  #parent(block: CachedBlock): CachedBlock | null {
    return this.index.get(block.parentId);
  }

  #orderBehindCompute(stream: "load" | "save"): void {
    this.device.record("compute", this.#computePoint, false);
    this.device.streamWait(stream, this.#computePoint);
  }

  #markDirty(block: CachedBlock, nowMs: number): void {
    if (this.tiers.disk === null) return;
    this.dirty.delete(block);
    this.dirty.set(block, nowMs);
  }

  /** A free host slot, or that of a victim which loses nothing by it. */
  #takeHost(): BlockNumber | null {
    if (this.tiers.host === null) return null;
    const free = this.#host.allocate();
    if (free !== null) return free;
    const victim = this.#host.pool.victim();
    if (victim === null) return null;
    const hasOther = victim.isDiskReady || (this.options.isExclusive && victim.gpu !== ABSENT);
    if (!hasOther) return null;
    this.evictHost(victim);
    return this.#host.allocate();
  }

  /** A free disk slot, or that of a victim worth less than `block`. */
  #takeDisk(block: CachedBlock): BlockNumber | null {
    const { pool } = this.tiers.disk!;
    const free = pool.allocate();
    if (free !== null) return free;
    const victim = pool.victim();
    if (victim === null || !pool.order.isWorthReplacing(block)) return null;
    this.counters.evictedDiskBlocks++;
    pool.disown(victim.disk);
    victim.disk = ABSENT;
    victim.isDiskReady = false; // nor is it written again for being idle: that could go on for ever
    this.#forgetIfLost(victim, "evicted");
    return pool.allocate();
  }

  #leaveHost(block: CachedBlock): void {
    if (block.host === ABSENT) return;
    this.#host.disown(block);
    block.host = ABSENT;
    this.#leaving.delete(block);
    this.#descending.delete(block);
  }

  #leaveDisk(block: CachedBlock, nowMs: number): void {
    if (block.disk === ABSENT) return;
    const { pool } = this.tiers.disk!;
    const slot = block.disk;
    block.disk = ABSENT;
    block.isDiskReady = false;
    if (pool.refCount(slot) > 0) {
      pool.disown(slot); // a move is under way: it erases the slot when it has ended
      return;
    }
    pool.retain(slot);
    pool.disown(slot);
    this.tiers.disk!.erase(slot, nowMs);
  }

  #forgetIfLost(block: CachedBlock, reason: MissReason): void {
    if (block.gpu !== ABSENT || block.host !== ABSENT || block.disk !== ABSENT) return;
    if (this.index.get(block.id) !== block) return;
    this.index.remove(block);
    this.policy.forget(block);
    this.dirty.delete(block);
    this.lost.note(block.id, reason);
  }

  #endLoad({ transfer, blocks }: Load, nowMs: number): boolean {
    if (!transfer.isDone()) return false;
    const { hostSlots, gpuBlocks, startedAtMs } = transfer;
    this.loadRate.note(blocks.length * this.options.blockBytes, startedAtMs, nowMs);
    transfer.endedAtMs = nowMs;
    this.counters.loadedBlocks += blocks.length;
    blocks.forEach((block, i) => {
      this.#host.pool.release(hostSlots[i]!);
      if (block.gpuLoad === transfer) block.gpuLoad = null;
      const isMoved = this.options.isExclusive && block.gpu === gpuBlocks[i] && block.host === hostSlots[i];
      if (isMoved && this.#host.pool.refCount(block.host) === 0) this.#leaveHost(block);
      this.releaseGpu(gpuBlocks[i]!);
    });
    transfer.dispose();
    return true;
  }

  #endSave({ transfer, blocks }: Save): boolean {
    if (!transfer.isDone()) return false;
    const { hostSlots, gpuBlocks } = transfer;
    this.counters.savedBlocks += blocks.length;
    blocks.forEach((block, i) => {
      const isStillThere = block.host === hostSlots[i];
      if (isStillThere) {
        block.hostState = "ready";
        this.#host.markReady(block);
      }
      this.#host.pool.release(hostSlots[i]!);
      this.gpu.release(gpuBlocks[i]!);
      if (!isStillThere || !this.#descending.delete(block) || block.gpu === ABSENT) return;
      if (this.gpu.refCount(block.gpu) === 0) this.leaveGpu(block, "evicted");
    });
    transfer.dispose();
    return true;
  }

  #endRead(move: EndedMove, nowMs: number): void {
    const { block, hostSlot, diskSlot, outcome, isMemoryFree } = move;
    const isStillThere = block.host === hostSlot && this.#host.pool.owner(hostSlot) === block;
    if (outcome === "ok") {
      if (isStillThere) {
        block.hostState = "ready";
        this.#host.markReady(block);
        this.counters.readBlocks++;
      }
      this.#host.pool.release(hostSlot);
      this.#giveBackDisk(diskSlot, nowMs);
      return;
    }
    if (isStillThere) this.#leaveHost(block);
    if (block.disk === diskSlot) {
      this.tiers.disk!.pool.disown(diskSlot);
      block.disk = ABSENT;
      block.isDiskReady = false;
      if (isResident(block)) this.#markDirty(block, nowMs);
      this.#forgetIfLost(block, outcome === "no-space" ? "io" : outcome);
    }
    if (!isMemoryFree) return;
    this.#host.pool.release(hostSlot);
    this.#quarantine(diskSlot, outcome === "corrupt", nowMs);
  }

  /** A slot that gave back something else than was written stays out of use until the next start. */
  #quarantine(diskSlot: BlockNumber, isReadable: boolean, nowMs: number): void {
    this.counters.quarantinedSlots++;
    if (!isReadable) return;
    // Its header must not be believed by the next start either. The slot is nobody's and stays in use.
    this.tiers.disk!.eraseForGood(diskSlot, nowMs);
  }

  #endWrite(move: EndedMove, nowMs: number): void {
    const { block, hostSlot, diskSlot, outcome, isMemoryFree } = move;
    const isStillThere = block.disk === diskSlot;
    if (outcome === "ok" && isStillThere) {
      block.isDiskReady = true;
      this.counters.writtenBlocks++;
    } else if (isStillThere) {
      this.tiers.disk!.pool.disown(diskSlot);
      block.disk = ABSENT;
      if (isResident(block)) this.#markDirty(block, nowMs);
    }
    if (!isMemoryFree) return;
    this.#host.pool.release(hostSlot);
    this.#giveBackDisk(diskSlot, nowMs);
    const isDuplicate = this.options.isExclusive && block.gpu !== ABSENT;
    if (block.host !== hostSlot || (!this.#leaving.delete(block) && !isDuplicate)) return;
    if (this.#host.pool.refCount(hostSlot) === 0) this.evictHost(block);
  }

  /** The move no longer needs the slot; where its block left it meanwhile, what was written must go. */
  #giveBackDisk(diskSlot: BlockNumber, nowMs: number): void {
    const disk = this.tiers.disk!;
    if (disk.pool.owner(diskSlot) === null && disk.pool.refCount(diskSlot) === 1) disk.erase(diskSlot, nowMs);
    else disk.pool.release(diskSlot);
  }
}
