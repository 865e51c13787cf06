// The simulated tiers: which blocks are where, what is being moved, and what the policy says should move
// next. The same CachePolicy as in the server decides; here it only moves counts.

import { assert } from "../assert.ts";
import { blocksToDemote, CachePolicy, evictionBudget, prefetchBudget } from "../kvcache/policy.ts";
import type { PolicyName, Watermarks } from "../kvcache/policy.ts";
import type { VictimOrder } from "../kvcache/victim-order.ts";
import type { SimulatedBlock } from "./conversation.ts";
import { DiskChannel } from "./disk-channel.ts";
import type { EventQueue } from "./event-queue.ts";

export type Tier = "gpu" | "host" | "disk";

export interface StoreOptions {
  readonly policy: PolicyName;
  /** Capacities in blocks; the gpu tier keeps blocks beyond those of running turns. */
  readonly gpuBlocks: number;
  readonly hostBlocks: number;
  readonly diskBlocks: number;
  readonly blockBytes: number;
  /** Bytes per second. */
  readonly diskReadRate: number;
  readonly diskWriteRate: number;
  /** Shares of the host tier that demotion keeps free. */
  readonly lowWatermark: number;
  readonly highWatermark: number;
  /** Idle time after which blocks are dropped, ms; Infinity: never. */
  readonly ttlMs: number;
}

/** What one disk transfer moves before the next choice: a tenth of a second at 5 GB/s. */
const CHUNK_BYTES = 5e8;

export class TieredStore {
  readonly policy: CachePolicy<SimulatedBlock>;
  readonly #marks: Watermarks;
  readonly #chunkBlocks: number;
  readonly #reader: DiskChannel<SimulatedBlock>;
  readonly #writer: DiskChannel<SimulatedBlock>;
  /** Needed by running turns; goes before prefetching. */
  readonly #demandReads: SimulatedBlock[] = [];
  readonly #demotions: SimulatedBlock[] = [];
  #demotingCount = 0;
  /** Host blocks that running turns use. */
  #runningCount = 0;
  demandReadBlocks = 0;
  skippedSaveBlocks = 0;
  lostBlocks = 0;
  expiredBlocks = 0;

  constructor(
    readonly events: EventQueue,
    readonly options: StoreOptions,
  ) {
    const { policy, hostBlocks, diskBlocks, blockBytes } = options;
    this.policy = new CachePolicy({ policy, windowBlocks: evictionBudget(hostBlocks, diskBlocks) });
    this.#marks = {
      lowBlocks: Math.ceil(hostBlocks * options.lowWatermark),
      highBlocks: Math.ceil(hostBlocks * options.highWatermark),
    };
    this.#chunkBlocks = Math.max(1, Math.floor(CHUNK_BYTES / blockBytes));
    this.#reader = new DiskChannel(events, {
      bytesPerSecond: options.diskReadRate,
      blockBytes,
      take: () => this.#takeReads(),
      onMoved: (blocks) => {
        for (const block of blocks) this.#onRead(block);
        this.maintain();
      },
    });
    this.#writer = new DiskChannel(events, {
      bytesPerSecond: options.diskWriteRate,
      blockBytes,
      take: () => this.#demotions.splice(0, this.#chunkBlocks),
      onMoved: (blocks) => {
        for (const block of blocks) this.#onWritten(block);
        this.maintain();
      },
    });
  }

  get readBlocks(): number {
    return this.#reader.movedBlocks;
  }

  get writtenBlocks(): number {
    return this.#writer.movedBlocks;
  }

  /** Where the block can be used from; null: nowhere. A block on its way up still counts as on disk. */
  tierOf(block: SimulatedBlock): Tier | null {
    if (this.policy.gpu.has(block)) return "gpu";
    if (this.policy.host.has(block) && !block.isReading) return "host";
    return this.policy.disk.has(block) || block.isReading ? "disk" : null;
  }

  /** The leading blocks that are cached somewhere. */
  cachedPrefix(blocks: readonly SimulatedBlock[]): SimulatedBlock[] {
    const end = blocks.findIndex((block) => this.tierOf(block) === null);
    return end < 0 ? [...blocks] : blocks.slice(0, end);
  }

  /**
   * A turn runs: its cached blocks stay, and `onResident` is called when all of them have been read from
   * disk.
   */
  open(blocks: readonly SimulatedBlock[], onResident: () => void): void {
    const toRead = blocks.filter((block) => this.tierOf(block) === "disk");
    for (const block of blocks) this.#pin(block);
    this.#runningCount += blocks.length;
    if (toRead.length === 0) return onResident();
    let left = toRead.length;
    for (const block of toRead) {
      block.readers.push(() => {
        if (--left === 0) onResident();
      });
      if (!block.isReading) this.#demandReads.push(block);
    }
    this.#reader.wake();
  }

  /**
   * A turn is over: `used` were pinned by open(), `all` is the conversation now, `changed` its new or grown
   * blocks.
   */
  close(
    used: readonly SimulatedBlock[],
    all: readonly SimulatedBlock[],
    changed: ReadonlySet<SimulatedBlock>,
  ): void {
    this.#runningCount -= used.length;
    for (const block of used) this.#unpin(block);
    this.policy.touch(all, this.events.nowMs, { ttlMs: this.options.ttlMs });
    for (const block of all) this.#save(block, changed.has(block));
    this.maintain();
  }

  /** Nobody will want these again. */
  drop(blocks: readonly SimulatedBlock[]): void {
    for (const block of blocks) {
      block.isDropped = true;
      if (block.pinCount === 0) this.#removeEverywhere(block);
    }
  }

  /** Background work: expiry, demotion between the watermarks, prefetching. */
  maintain(): void {
    for (const block of this.policy.expire(this.events.nowMs)) {
      this.expiredBlocks++;
      this.#removeEverywhere(block);
    }
    this.#demote();
    this.#writer.wake();
    this.#reader.wake();
  }

  /** For tests: no tier holds more than its size, and nothing is left in transit. */
  checkInvariants(): void {
    const { gpu, host, disk } = this.policy;
    const { gpuBlocks, hostBlocks, diskBlocks } = this.options;
    this.policy.checkInvariants();
    assert(gpu.residentCount <= gpuBlocks, "the gpu tier is overfull");
    assert(host.residentCount <= hostBlocks, "the host tier is overfull");
    assert(disk.residentCount <= diskBlocks, "the disk tier is overfull");
    assert(this.#demotingCount >= 0 && this.#runningCount >= 0, "a count fell below zero");
  }

  get #hostFree(): number {
    return this.options.hostBlocks - this.policy.host.residentCount;
  }

  #pin(block: SimulatedBlock): void {
    if (block.pinCount++ > 0) return;
    for (const tier of this.#tiers()) if (tier.has(block)) tier.retain(block);
  }

  #unpin(block: SimulatedBlock): void {
    assert(block.pinCount > 0, "the block is not pinned");
    if (--block.pinCount > 0) return;
    for (const tier of this.#tiers()) if (tier.has(block)) tier.release(block);
    if (block.isDropped) this.#removeEverywhere(block);
  }

  #tiers(): VictimOrder<SimulatedBlock>[] {
    return [this.policy.gpu, this.policy.host, this.policy.disk];
  }

  /** A new resident block of a tier is pinned there; it stays so exactly while the block itself is. */
  #enter(tier: VictimOrder<SimulatedBlock>, block: SimulatedBlock): void {
    tier.insert(block, block.parent);
    if (block.pinCount === 0) tier.release(block);
  }

  #removeEverywhere(block: SimulatedBlock): void {
    for (const tier of this.#tiers()) if (tier.has(block)) tier.remove(block);
    this.policy.forget(block);
  }

  /** KV that a turn computed goes to host memory, and to the gpu tier while there is room. */
  #save(block: SimulatedBlock, isChanged: boolean): void {
    const { gpu, host, disk } = this.policy;
    if (isChanged && disk.has(block)) {
      if (block.pinCount === 0) disk.remove(block);
      else block.isDiskStale = true;
    }
    this.#saveToGpu(block);
    if (host.has(block) || (!isChanged && disk.has(block))) return;
    if (this.#hostFree > 0 || this.#freeHostBlock()) this.#enter(host, block);
    else {
      this.skippedSaveBlocks++;
      if (!gpu.has(block) && !disk.has(block)) this.policy.forget(block);
    }
  }

  #saveToGpu(block: SimulatedBlock): void {
    const { gpu } = this.policy;
    if (this.options.gpuBlocks === 0 || gpu.has(block)) return;
    if (gpu.residentCount === this.options.gpuBlocks) {
      const victim = gpu.next();
      if (victim === null) return;
      gpu.remove(victim);
      this.#forgetIfLost(victim);
    }
    this.#enter(gpu, block);
  }

  /**
   * At once, without waiting for a write: only a block whose copy on disk is good can go. Where demotion does not keep
   * up, new KV is not saved rather than old KV lost: most of the new is never used again.
   */
  #freeHostBlock(): boolean {
    const { host, disk } = this.policy;
    const victim = host.next();
    if (victim === null || !disk.has(victim)) return false;
    host.remove(victim);
    return true;
  }

  #demote(): void {
    let count = blocksToDemote(this.#hostFree, this.#demotingCount, this.#marks);
    for (; count > 0; count--) {
      const victim = this.policy.host.next();
      if (victim === null) return;
      if (this.policy.disk.has(victim)) this.policy.host.remove(victim);
      else if (this.#makeDiskRoom(victim)) this.#startDemotion(victim);
      else {
        this.policy.host.remove(victim);
        this.#forgetIfLost(victim);
      }
    }
  }

  #startDemotion(block: SimulatedBlock): void {
    block.isWriting = true;
    block.isDiskStale = false;
    this.#pin(block);
    this.policy.disk.insert(block, block.parent);
    this.#demotingCount++;
    this.#demotions.push(block);
  }

  /** False: all that is on disk is worth more than this block. */
  #makeDiskRoom(block: SimulatedBlock): boolean {
    const { disk } = this.policy;
    if (disk.residentCount < this.options.diskBlocks) return true;
    if (!disk.isWorthReplacing(block)) return false;
    const victim = disk.next()!;
    disk.remove(victim);
    this.#forgetIfLost(victim);
    return true;
  }

  #forgetIfLost(block: SimulatedBlock): void {
    if (this.tierOf(block) !== null) return;
    this.lostBlocks++;
    this.policy.forget(block);
  }

  #onWritten(block: SimulatedBlock): void {
    const { host, disk } = this.policy;
    block.isWriting = false;
    this.#demotingCount--;
    this.#unpin(block);
    if (block.isDropped && block.pinCount === 0) return;
    if (block.isDiskStale) {
      disk.remove(block);
      block.isDiskStale = false;
    } else if (block.pinCount === 0) host.remove(block);
  }

  #takeReads(): SimulatedBlock[] {
    const demanded = this.#demandReads.splice(0, this.#chunkBlocks).filter((block) => !block.isReading);
    this.demandReadBlocks += demanded.length;
    const chunk = demanded.length > 0 ? demanded : this.#prefetches();
    for (const block of chunk) {
      block.isReading = true;
      this.#pin(block);
      // No room: the running turn gets it through a bounce buffer, and host memory does not keep it.
      if (this.#hostFree > 0 || this.#freeHostBlock()) this.#enter(this.policy.host, block);
    }
    return chunk;
  }

  #prefetches(): SimulatedBlock[] {
    const { host, disk } = this.policy;
    const { lowBlocks, highBlocks } = this.#marks;
    const room = Math.min(this.#chunkBlocks, this.#hostFree - Math.floor(lowBlocks / 2));
    const window = prefetchBudget(this.options.hostBlocks, this.#runningCount, highBlocks);
    return this.policy.prefetch(window, room, (block) => !host.has(block) && disk.has(block));
  }

  #onRead(block: SimulatedBlock): void {
    block.isReading = false;
    this.#unpin(block);
    for (const notify of block.readers.splice(0)) notify();
  }
}
