// Blocks on their way between the tiers. Everything is started here and ends in poll(); nothing waits. A move holds the
// places it copies between until it has ended, and when it ends it looks whether the block still owns them: a block may
// be dropped or renamed meanwhile.

import { assert } from "../assert.ts";
import type { EventHandle } from "../native.ts";
import type { BlockNumber } from "./block-pool.ts";
import { ABSENT, type CachedBlock, isHostReady, isResident } from "./cached-block.ts";
import type { EndedMove } from "./disk-tier.ts";
import type { HostTier } from "./host-tier.ts";
import { type CopyDevice, EventPool, LayerTransfer } from "./layer-transfer.ts";
import { RateMeter } from "./rate-meter.ts";
import type { Residency } from "./residency.ts";

/**
 * A point of the compute stream that copies wait for keeps the kernels before and behind it from overlapping, so there
 * is not one behind each layer of a step.
 */
const LAYERS_PER_SAVE = 8;

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

export class BlockMoves {
  readonly loadRate = new RateMeter();
  readonly readRate = new RateMeter();
  readonly #events: EventPool;
  /** Marks a point of the compute stream for the copy streams to wait for; recorded anew each time. */
  readonly #computePoint: EventHandle;
  #loads: Load[] = [];
  #saves: Save[] = [];

  constructor(
    readonly device: CopyDevice,
    readonly residency: Residency,
  ) {
    this.#events = new EventPool(device);
    this.#computePoint = device.createEvent();
  }

  /** Moves that have not ended. */
  get inFlight(): number {
    return this.#loads.length + this.#saves.length + (this.residency.tiers.disk?.operationCount ?? 0);
  }

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
      this.device, this.#events, "load", hostSlots, Int32Array.from(gpuBlocks), this.residency.options.layers, nowMs,
    );
    blocks.forEach((block, i) => {
      const gpu = gpuBlocks[i]!;
      assert(isHostReady(block), "only what is ready in host memory can be loaded");
      this.#host.pool.retain(block.host);
      this.residency.gpu.retain(gpu);
      if (!owned[i]) return;
      this.residency.gpu.setOwner(gpu, block, this.residency.parent(block));
      block.gpu = gpu;
      block.gpuLoad = transfer;
    });
    if (gpuBlocks.some((gpu) => this.residency.isTouched(gpu))) this.#orderBehindCompute("load");
    this.#loads.push({ transfer, blocks });
    transfer.begin();
    return transfer;
  }

  /**
   * Copies blocks from the gpu into host slots, as many as find room. Ordered behind what the compute stream has now,
   * or layer by layer behind the step that is enqueued next (afterLayer). Returns those into which a load is still
   * under way: they can be saved when it has ended.
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
      const slot = this.residency.takeHost();
      if (slot === null) {
        this.residency.counters.skippedSaves++;
        continue;
      }
      this.#host.pool.setOwner(slot, block, this.residency.parent(block));
      block.host = slot;
      block.hostState = "arriving";
      this.residency.gpu.retain(block.gpu);
      chosen.push(block);
    }
    if (chosen.length === 0) return later;
    const hostSlots = Int32Array.from(chosen, ({ host }) => host);
    const gpuBlocks = Int32Array.from(chosen, ({ gpu }) => gpu);
    const transfer = new LayerTransfer(
      this.device, this.#events, "save", hostSlots, gpuBlocks, this.residency.options.layers, nowMs,
    );
    if (order === "now") this.#orderBehindCompute("save");
    this.#saves.push({ transfer, blocks: chosen, isOrdered: order === "now" });
    if (order === "now") transfer.pump();
    return later;
  }

  /** A step's layer is enqueued: the saves that wait for it may copy that layer, some layers at a time. */
  afterLayer(layer: number): void {
    const end = layer + 1;
    const isLast = end === this.residency.options.layers;
    if (end % LAYERS_PER_SAVE !== 0 && !isLast) return;
    const waiting = this.#saves.filter(({ isOrdered }) => !isOrdered);
    if (waiting.length === 0) return;
    this.#orderBehindCompute("save");
    for (const save of waiting) {
      save.transfer.pump(end);
      save.isOrdered = isLast;
    }
  }

  /** Starts reading a block from disk into host memory; false: no room, or nothing to read. */
  read(block: CachedBlock, nowMs: number): boolean {
    const { disk } = this.residency.tiers;
    if (disk === null || block.disk === ABSENT || !block.isDiskReady || block.host !== ABSENT) return false;
    const hostSlot = this.residency.takeHost();
    if (hostSlot === null) return false;
    this.#host.pool.setOwner(hostSlot, block, this.residency.parent(block));
    block.host = hostSlot;
    block.hostState = "arriving";
    disk.pool.retain(block.disk);
    disk.read({ block, hostSlot, diskSlot: block.disk }, this.#host.address(hostSlot), nowMs);
    return true;
  }

  /** Starts writing a block from host memory to disk; false: the disk holds nothing worth less. */
  write(block: CachedBlock, nowMs: number): boolean {
    const { disk } = this.residency.tiers;
    if (disk === null || block.disk !== ABSENT || !this.residency.verify(block)) return false;
    const diskSlot = this.residency.takeDisk(block);
    if (diskSlot === null) {
      this.residency.dirty.delete(block); // it would be refused again and again
      return false;
    }
    disk.pool.setOwner(diskSlot, block, this.residency.parent(block));
    block.disk = diskSlot;
    block.isDiskReady = false;
    this.residency.dirty.delete(block);
    this.#host.pool.retain(block.host);
    disk.write({ block, hostSlot: block.host, diskSlot }, this.#host.address(block.host), nowMs);
    return true;
  }

  /** Leaves host memory when its copy on disk is whole (at once, if it is already). */
  demote(block: CachedBlock): void {
    if (block.isDiskReady && this.#host.pool.refCount(block.host) === 0) this.residency.evictHost(block);
    else this.residency.leaving.add(block);
  }

  /**
   * Exclusive tiers: before blocks are taken, those in the way move down. False: they are on their way, ask again.
   * True: so many are free, or more can only be had by losing what they hold. `waitsForDisk`: where host memory is full
   * and the disk takes from it, that is waited for, too (who runs already does not).
   */
  clearGpu(count: number, nowMs: number, waitsForDisk: boolean): boolean {
    if (!this.residency.options.isExclusive || this.residency.tiers.host === null) return true;
    while (this.residency.gpu.freeCount + this.residency.descending.size < count) {
      const victim = this.residency.gpu.victim();
      if (victim === null) break;
      if (isHostReady(victim) || victim.isDiskReady) this.residency.leaveGpu(victim, "evicted");
      else if (this.residency.hasHostRoom) this.descend([victim], nowMs);
      else if (this.#isHostDraining(nowMs)) {
        if (waitsForDisk) return false;
        break;
      }
      else if (!this.#makeHostRoom(victim)) break;
    }
    return this.residency.gpu.freeCount >= count || this.residency.descending.size === 0;
  }

  /** Saves the block and then takes it off the gpu (exclusive tiers). */
  descend(blocks: readonly CachedBlock[], nowMs: number): void {
    for (const block of blocks) this.residency.descending.add(block);
    this.save(blocks, "now", nowMs);
    for (const block of blocks) if (block.host === ABSENT) this.residency.descending.delete(block);
  }

  /** Learns what has ended, and goes on with what the streams had no room for. */
  poll(nowMs: number): void {
    for (const { transfer } of this.#loads) transfer.pump();
    for (const { transfer, isOrdered } of this.#saves) if (isOrdered) transfer.pump();
    this.#loads = this.#loads.filter((load) => !this.#endLoad(load, nowMs));
    this.#saves = this.#saves.filter((save) => !this.#endSave(save));
    for (const move of this.residency.tiers.disk?.poll(nowMs) ?? []) {
      if (move.kind === "read") this.#endRead(move, nowMs);
      else this.#endWrite(move, nowMs);
    }
  }

  get #host(): HostTier {
    return this.residency.tiers.host!;
  }

  /**
   * The disk takes what has to leave host memory. Losing a block in its stead would tear a hole into a conversation
   * whose end has gone down before.
   */
  #isHostDraining(nowMs: number): boolean {
    const { host, disk } = this.residency.tiers;
    if (disk === null || !disk.isOn(nowMs)) return false;
    return this.residency.leaving.size > 0 || host!.pool.victim() !== null;
  }

  /** Room for this block, where only a block that is worth less can be lost for it. */
  #makeHostRoom(block: CachedBlock): boolean {
    const { pool } = this.#host;
    const victim = pool.victim();
    if (victim === null || !pool.order.isWorthReplacing(block)) return false;
    this.residency.evictHost(victim);
    return true;
  }

  #orderBehindCompute(stream: "load" | "save"): void {
    this.device.record("compute", this.#computePoint, false);
    this.device.streamWait(stream, this.#computePoint);
  }

  #endLoad({ transfer, blocks }: Load, nowMs: number): boolean {
    if (!transfer.isDone()) return false;
    const { hostSlots, gpuBlocks, startedAtMs } = transfer;
    this.loadRate.note(blocks.length * this.residency.options.blockBytes, startedAtMs, nowMs);
    transfer.endedAtMs = nowMs;
    this.residency.counters.loadedBlocks += blocks.length;
    blocks.forEach((block, i) => {
      this.#host.pool.release(hostSlots[i]!);
      if (block.gpuLoad === transfer) block.gpuLoad = null;
      const isMoved = this.residency.options.isExclusive && block.gpu === gpuBlocks[i] && block.host === hostSlots[i];
      if (isMoved && this.#host.pool.refCount(block.host) === 0) this.residency.leaveHost(block);
      this.residency.releaseGpu(gpuBlocks[i]!);
    });
    transfer.dispose();
    return true;
  }

  #endSave({ transfer, blocks }: Save): boolean {
    if (!transfer.isDone()) return false;
    const { hostSlots, gpuBlocks } = transfer;
    this.residency.counters.savedBlocks += blocks.length;
    blocks.forEach((block, i) => {
      const isStillThere = block.host === hostSlots[i];
      if (isStillThere) {
        block.hostState = "ready";
        this.#host.markReady(block);
      }
      this.#host.pool.release(hostSlots[i]!);
      this.residency.gpu.release(gpuBlocks[i]!);
      if (!isStillThere || !this.residency.descending.delete(block) || block.gpu === ABSENT) return;
      if (this.residency.gpu.refCount(block.gpu) === 0) this.residency.leaveGpu(block, "evicted");
    });
    transfer.dispose();
    return true;
  }

  #endRead(move: EndedMove, nowMs: number): void {
    const { block, hostSlot, diskSlot, outcome, isMemoryFree, bytes, elapsedMs } = move;
    const isStillThere = block.host === hostSlot && this.#host.pool.owner(hostSlot) === block;
    if (outcome === "ok") {
      this.readRate.note(bytes, nowMs - elapsedMs, nowMs);
      if (isStillThere) {
        block.hostState = "ready";
        this.#host.markReady(block);
        this.residency.counters.readBlocks++;
      }
      this.#host.pool.release(hostSlot);
      this.#giveBackDisk(diskSlot, nowMs);
      return;
    }
    if (isStillThere) this.residency.leaveHost(block);
    if (block.disk === diskSlot) {
      this.residency.tiers.disk!.pool.disown(diskSlot);
      block.disk = ABSENT;
      block.isDiskReady = false;
      if (isResident(block)) this.residency.markDirty(block, nowMs);
      this.residency.forgetIfLost(block, outcome === "no-space" ? "io" : outcome);
    }
    if (!isMemoryFree) return;
    this.#host.pool.release(hostSlot);
    this.#quarantine(diskSlot, nowMs);
  }

  /** A slot that did not give back what was written stays out of use until the next start. */
  #quarantine(diskSlot: BlockNumber, nowMs: number): void {
    this.residency.counters.quarantinedSlots++;
    // Its header must not be believed by the next start either: its block may be deleted, and not be found here any
    // more. The slot is nobody's and stays in use.
    this.residency.tiers.disk!.eraseForGood(diskSlot, nowMs);
  }

  #endWrite(move: EndedMove, nowMs: number): void {
    const { block, hostSlot, diskSlot, outcome, isMemoryFree } = move;
    const isStillThere = block.disk === diskSlot;
    if (outcome === "ok" && isStillThere) {
      block.isDiskReady = true;
      this.residency.counters.writtenBlocks++;
    } else if (isStillThere) {
      this.residency.tiers.disk!.pool.disown(diskSlot);
      block.disk = ABSENT;
      if (isResident(block)) this.residency.markDirty(block, nowMs);
    }
    if (!isMemoryFree) return;
    this.#host.pool.release(hostSlot);
    this.#giveBackDisk(diskSlot, nowMs);
    const isDuplicate = this.residency.options.isExclusive && block.gpu !== ABSENT;
    // What the disk did not take stays.
    const isLeaving = this.residency.leaving.delete(block) && block.isDiskReady;
    if (block.host !== hostSlot || (!isLeaving && !isDuplicate)) return;
    if (this.#host.pool.refCount(hostSlot) === 0) this.residency.evictHost(block);
  }

  /** The move no longer needs the slot; where its block left it meanwhile, what was written must go. */
  #giveBackDisk(diskSlot: BlockNumber, nowMs: number): void {
    const disk = this.residency.tiers.disk!;
    if (disk.pool.owner(diskSlot) === null && disk.pool.refCount(diskSlot) === 1) disk.erase(diskSlot, nowMs);
    else disk.pool.release(diskSlot);
  }
}
