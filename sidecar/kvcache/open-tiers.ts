// The tiers below the gpu, opened on a device: the host arena and the disk tier's file, and what an earlier process
// left in them. Whatever cannot be had is said in one line, and the cache does without.

import { existsSync, mkdirSync, statfsSync } from "node:fs";
import { dirname } from "node:path";
import { Disk } from "../native-disk.ts";
import { type Device, hostView, type HostArena, NativeError, type NativeLibrary, Status } from "../native.ts";
import { adoptDisk, adoptHost } from "./adopt-blocks.ts";
import { HEADER_BYTES } from "./block-header.ts";
import type { CachedBlock } from "./cached-block.ts";
import { describeDiskLimit, diskFileBytes, diskSlotCount } from "./disk-layout.ts";
import { DiskStore } from "./disk-store.ts";
import { DiskTier } from "./disk-tier.ts";
import { HostTier } from "./host-tier.ts";
import type { CachePolicy } from "./policy.ts";
import { readableBytes } from "./readable-bytes.ts";
import type { LowerTiers, Residency } from "./residency.ts";

export interface TierOptions {
  readonly fingerprint: string;
  /** 0: no host tier, and then no disk tier either, for blocks reach the disk through host memory. */
  readonly hostBytes: number;
  /** POSIX shared-memory name under which the host tier survives this process; null: it does not. */
  readonly hostName: string | null;
  /** 0: no disk tier. */
  readonly diskBytes: number;
  readonly diskPath: string;
  readonly ioThreads: number;
  readonly readTimeoutMs: number;
  readonly writeTimeoutMs: number;
}

/** A tier that was asked for cannot be had; the message says why and what to do. */
export class TierError extends Error {
  override name = "TierError";
}

/** Headers on their way to disk at once. */
const HEADER_BUFFERS = 64;
const CLOSE_TIMEOUT_US = 5_000_000;
/** Headers of so many take seconds to read. */
const MANY_SLOTS = 200_000;

/** Opened tiers, before the cache that uses them exists. */
export class Tiers {
  readonly hostSlots: number;
  readonly diskSlots: number;
  readonly arena: HostArena | null;
  readonly #disk: Disk | null;

  /** Throws TierError: another process has the file, it does not fit the disk, or its folder is nowhere. */
  constructor(
    readonly library: NativeLibrary,
    readonly device: Device,
    readonly options: TierOptions,
    readonly say: (message: string) => void,
  ) {
    const { slotBytes } = device.blockBytes();
    this.hostSlots = Math.floor(options.hostBytes / (slotBytes + HEADER_BYTES));
    this.diskSlots = this.hostSlots === 0 ? 0 : diskSlotCount(options.diskBytes, slotBytes);
    const limit = this.hostSlots === 0 ? null : describeDiskLimit(options.diskBytes, slotBytes);
    if (limit !== null) this.say(limit);
    this.#disk = this.diskSlots === 0 ? null : this.#openDisk(slotBytes);
    // Without the file's lock nobody guards the mapping: it is adopted only beside a disk tier.
    const name = this.#disk === null ? null : options.hostName;
    this.arena = this.hostSlots === 0 ? null : this.#openArena(name);
  }

  /** Makes the tiers for a cache of this policy. */
  create(policy: CachePolicy<CachedBlock>): LowerTiers {
    if (this.arena === null) return { host: null, disk: null };
    const { slotBytes } = this.device.blockBytes();
    const { slotsAddress, headersAddress, isShared } = this.arena;
    const headers = isShared ? new Uint8Array(hostView(headersAddress, this.hostSlots * HEADER_BYTES)) : null;
    const host = new HostTier(
      {
        slotCount: this.hostSlots,
        slotBytes,
        slotsAddress,
        headers,
        fingerprint: this.options.fingerprint,
        checksum: (address, bytes) => this.library.checksum(address, bytes),
      },
      policy.host,
    );
    return { host, disk: this.#disk === null ? null : this.#createDiskTier(this.#disk, slotBytes, policy) };
  }

  /** Takes over what an earlier process left. */
  adopt(residency: Residency, nowMs: number): void {
    const { host, disk } = residency.tiers;
    if (host !== null && this.arena?.isAdopted === true) this.say(adoptHost(host, residency, nowMs));
    if (disk === null) return;
    if (this.#disk?.isNew === false && this.diskSlots >= MANY_SLOTS) {
      this.say(`disk tier: reading the headers of ${this.diskSlots} slots`);
    }
    for (const line of adoptDisk(disk, residency, this.options.diskPath, nowMs)) this.say(line);
  }

  /** `keepHost`: the mapping stays for the next process to adopt. */
  close(keepHost: boolean): void {
    // The disk first: its threads read and write the arena.
    try {
      this.#disk?.close(CLOSE_TIMEOUT_US);
    } catch (error) {
      // Requests that the kernel still has: the file is only a cache, and its headers say what is whole.
      this.say(`disk tier: ${(error as Error).message}`);
    }
    if (this.arena !== null) this.device.closeHostArena(!(keepHost && this.arena.isShared));
  }

  #openArena(name: string | null): HostArena {
    const arena = this.#tryOpenArena(name);
    if (name !== null && !arena.isShared) {
      this.say("host tier: no room in shared memory: it will not survive a crash of this process");
    }
    return arena;
  }

  #tryOpenArena(name: string | null): HostArena {
    try {
      return this.device.openHostArena(name, this.hostSlots);
    } catch (error) {
      if (!(error instanceof NativeError) || error.status !== Status.outOfMemory) throw error;
      const size = readableBytes(this.options.hostBytes);
      throw new TierError(`no room for a host tier of ${size}: ${error.message}: give a smaller --host-memory`);
    }
  }

  #openDisk(slotBytes: number): Disk {
    const { diskPath, ioThreads } = this.options;
    const fileBytes = diskFileBytes(this.diskSlots, slotBytes);
    makeFolder(dirname(diskPath));
    try {
      const disk = new Disk(this.library, diskPath, fileBytes, ioThreads);
      disk.wake(this.device);
      if (!disk.isPreallocated) {
        this.say(`disk tier: ${diskPath} cannot be preallocated here: it grows up to its size, if there is room`);
      }
      if (!disk.isDirect) this.say(`disk tier: no direct I/O at ${diskPath}: reads go through the page cache`);
      return disk;
    } catch (error) {
      throw tierError(error, diskPath, fileBytes);
    }
  }

  #createDiskTier(disk: Disk, slotBytes: number, policy: CachePolicy<CachedBlock>): DiskTier {
    const { fingerprint, readTimeoutMs, writeTimeoutMs } = this.options;
    const store = new DiskStore(disk, {
      slotCount: this.diskSlots,
      slotBytes,
      fingerprint,
      headerBuffers: this.device.allocHost(HEADER_BUFFERS * HEADER_BYTES),
      readTimeoutMs,
      writeTimeoutMs,
    });
    return new DiskTier(store, policy.disk, this.say);
  }
}

/** Where even the folder above is missing a disk may not be mounted, and another one would be filled. */
function makeFolder(path: string): void {
  const above = dirname(path);
  if (!existsSync(above)) {
    throw new TierError(
      `the disk tier's folder cannot be made, because ${above} is not there: is its disk mounted? (--disk-path)`,
    );
  }
  mkdirSync(path, { recursive: true, mode: 0o700 });
}

function tierError(error: unknown, path: string, fileBytes: number): unknown {
  if (!(error instanceof NativeError)) return error;
  if (error.status === Status.inUse) {
    return new TierError(`another sidecar uses ${path}: give this one another --data directory or --disk-path`);
  }
  if (error.status === Status.noSpace) {
    const { bavail, bsize } = statfsSync(dirname(path));
    const [wanted, free] = [readableBytes(fileBytes), readableBytes(bavail * bsize)];
    return new TierError(
      `the disk tier wants ${wanted} at ${path}, but only ${free} are free: ` +
        "give a smaller --disk, or --disk 0 for none",
    );
  }
  return new TierError(`disk tier: ${error.message}`);
}
