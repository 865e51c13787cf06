// What the cache does on its own between steps: drop what expired, keep room free in each tier, fetch what the waiting
// queue will need, write what has become idle to disk, check what lies in host memory. Each call is bounded.

import type { BlockMoves } from "./block-moves.ts";
import { ABSENT, type CachedBlock, isHostReady } from "./cached-block.ts";
import type { DiskTier } from "./disk-tier.ts";
import type { HostTier } from "./host-tier.ts";
import { blocksToDemote, prefetchBudget, type Watermarks } from "./policy.ts";
import type { Residency } from "./residency.ts";

/** When blocks go to disk; always also on eviction from host memory. */
export const DISK_ADMISSIONS = ["idle", "eviction", "second-touch"] as const;
export type DiskAdmission = (typeof DISK_ADMISSIONS)[number];

export interface BackgroundOptions {
  readonly admission: DiskAdmission;
  /** With "idle": time without use after which a block is written. */
  readonly idleMs: number;
  readonly hostMarks: Watermarks;
  readonly gpuMarks: Watermarks;
  /** Disk moves in flight at once. */
  readonly maxReads: number;
  readonly maxWrites: number;
}

/** Moves started in one turn, so that no turn of the engine's loop takes long. */
const STARTS_PER_TURN = 32;
/** Over host slots. */
const CHECKSUMS_PER_TURN = 2;
const CHECKSUM_BYTES_PER_TURN = 16 * 2 ** 20;

/** Checksums over slots of this size in one turn: one at least, though LLaMA-13B's 52 MB take 3 ms. */
export function checksumsPerTurn(slotBytes: number): number {
  return Math.min(CHECKSUMS_PER_TURN, Math.max(1, Math.floor(CHECKSUM_BYTES_PER_TURN / slotBytes)));
}

export class Background {
  expiredBlocks = 0;
  prefetchedBlocks = 0;
  /** Moved or dropped in the last turn: there may be more. */
  #isActive = false;

  constructor(
    readonly residency: Residency,
    readonly moves: BlockMoves,
    readonly options: BackgroundOptions,
  ) {}

  /** Something will have to be done even if nothing happens. */
  isWaiting(nowMs: number): boolean {
    const { disk, host } = this.residency.tiers;
    const writes = this.options.admission !== "eviction" && this.residency.dirty.wantedCount > 0;
    const checks = host !== null && (host.hasUnsealed || host.nextUnverified() !== null);
    const { hasMortals } = this.residency.policy;
    return this.#isActive || (this.#isDiskOn(nowMs) && writes) || checks || hasMortals || this.#isDiskAwaited(disk);
  }

  /** What failed is tried again after a while, and what was given up may end. */
  #isDiskAwaited(disk: DiskTier | null): boolean {
    return disk !== null && (disk.hasAbandoned || (disk.hasUnerased && !disk.isGivenUp));
  }

  turn(nowMs: number): void {
    this.#isActive = false;
    this.#expire(nowMs);
    if (this.residency.tiers.host === null) return;
    this.#demoteGpu(nowMs);
    this.#demoteHost(nowMs);
    this.#prefetch(nowMs);
    this.#writeDirty(this.residency.dirty.wanted(), (usedAtMs) => this.#isDue(nowMs - usedAtMs), nowMs);
    this.#checkHost(this.residency.tiers.host);
  }

  /** Says of new blocks what they are, and looks at what was adopted before somebody needs it. */
  #checkHost(host: HostTier): void {
    const limit = checksumsPerTurn(host.options.slotBytes);
    for (let left = limit - host.seal(limit); left > 0; left--) {
      const block = host.nextUnverified();
      if (block === null) return;
      this.residency.verify(block);
    }
  }

  /** For an orderly stop: starts writing all that is not on disk; true while there is something left. */
  flush(nowMs: number): boolean {
    const { host, disk } = this.residency.tiers;
    if (host === null || disk === null || !disk.isOn(nowMs)) return false;
    this.#isActive = false;
    this.#writeDirty(this.residency.dirty.all(), () => true, nowMs);
    return this.moves.inFlight > 0 || this.#isActive;
  }

  #expire(nowMs: number): void {
    for (const block of this.residency.policy.expire(nowMs)) {
      this.residency.drop(block, "expired", nowMs);
      this.expiredBlocks++;
    }
  }

  /** Exclusive tiers: room in the gpu tier is made by moving blocks down, before anyone asks for it. */
  #demoteGpu(nowMs: number): void {
    const { residency } = this;
    const { gpu, options } = residency;
    if (!options.isExclusive) return;
    let count = blocksToDemote(gpu.freeCount, residency.descending.size, this.options.gpuMarks);
    for (let left = STARTS_PER_TURN; count > 0 && left > 0; count--, left--) {
      const victim = gpu.victim();
      if (victim === null) return;
      const isBelow = isHostReady(victim) || victim.isDiskReady;
      if (!isBelow && !residency.hasHostRoom) return; // it stays until someone needs its place
      this.#isActive = true;
      if (isBelow) residency.leaveGpu(victim, "evicted");
      else this.moves.descend([victim], nowMs);
    }
  }

  #demoteHost(nowMs: number): void {
    const { residency } = this;
    const { pool } = residency.tiers.host!;
    let count = blocksToDemote(pool.freeCount, residency.leaving.size, this.options.hostMarks);
    for (let left = STARTS_PER_TURN; count > 0 && left > 0; count--, left--) {
      const victim = pool.victim();
      if (victim === null) return;
      // While the disk is left alone host memory is the last tier.
      const isWritten = !victim.isDiskReady && this.#isAdmitted(victim) && this.#isDiskOn(nowMs);
      if (isWritten && !this.#canWrite(nowMs)) return;
      this.#isActive = true;
      if (!isWritten) residency.evictHost(victim);
      else if (this.moves.write(victim, nowMs)) this.moves.demote(victim);
      else if (victim.host !== ABSENT) residency.evictHost(victim); // the disk holds nothing worth less
    }
  }

  /** The queue's next blocks come up from disk before their turn (CachedAttention, 3.3.1). */
  #prefetch(nowMs: number): void {
    const { residency, options } = this;
    const { host, disk } = residency.tiers;
    if (disk === null || !disk.isOn(nowMs)) return;
    const { pool } = host!;
    const pinned = pool.blockCount - pool.availableCount;
    const window = prefetchBudget(pool.blockCount, pinned, options.hostMarks.highBlocks);
    const room = Math.min(options.maxReads - disk.readingCount, pool.availableCount);
    const blocks = residency.policy.prefetch(window, room, (block) =>
      block.isDiskReady && block.host === ABSENT && block.gpu === ABSENT,
    );
    for (const block of blocks) if (this.moves.read(block, nowMs)) this.prefetchedBlocks++;
  }

  /** Writes blocks that are not on disk, in order; where one is not due, nor are those behind it. */
  #writeDirty(dirty: Iterable<[CachedBlock, number]>, isDue: (usedAtMs: number) => boolean, nowMs: number): void {
    const { residency } = this;
    const toSave: CachedBlock[] = [];
    // What is on the gpu alone waits for room in host memory, and holds up nobody.
    let room = residency.hasHostRoom ? Math.max(1, residency.tiers.host!.pool.freeCount) : 0;
    let left = STARTS_PER_TURN;
    for (const [block, usedAtMs] of dirty) {
      if (left === 0 || !this.#canWrite(nowMs) || !isDue(usedAtMs)) break;
      if (isHostReady(block)) {
        this.moves.write(block, nowMs); // or it is refused for good
      } else if (block.host === ABSENT && block.gpu !== ABSENT && room > 0) {
        toSave.push(block);
        room--;
      } else continue;
      this.#isActive = true;
      left--;
    }
    if (toSave.length > 0) this.moves.save(toSave, "now", nowMs);
  }

  /** Goes to disk before it has to leave host memory. */
  #isDue(idleMs: number): boolean {
    const { admission } = this.options;
    return admission === "second-touch" || (admission === "idle" && idleMs >= this.options.idleMs);
  }

  #isAdmitted(block: CachedBlock): boolean {
    return this.options.admission !== "second-touch" || block.useCount > 1;
  }

  #isDiskOn(nowMs: number): boolean {
    return this.residency.tiers.disk?.isOn(nowMs) === true;
  }

  #canWrite(nowMs: number): boolean {
    return this.#isDiskOn(nowMs) && this.residency.tiers.disk!.writingCount < this.options.maxWrites;
  }
}
