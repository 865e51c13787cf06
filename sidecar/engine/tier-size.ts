// How large the tiers below the gpu are when nobody says: a share of what this machine, or the cgroup it runs in, has
// free.

import { existsSync, readFileSync, statfsSync } from "node:fs";
import { totalmem } from "node:os";
import { dirname } from "node:path";
import { TierError } from "../kvcache/open-tiers.ts";
import { readableBytes } from "../kvcache/readable-bytes.ts";

export interface TierSizeInput {
  /** --host-memory and --disk, in bytes; null: choose. */
  readonly wantedHostBytes: number | null;
  readonly wantedDiskBytes: number | null;
  readonly isGpu: boolean;
  /** Memory that this process may still take. */
  readonly freeBytes: number;
  /** Memory that it may take in all: what an earlier process left for it to adopt is not free. */
  readonly totalBytes: number;
  /** Room on the file system of the disk tier's file. */
  readonly diskFreeBytes: number;
}

const GIB = 2 ** 30;
/** Of free memory and free disk. A GPU box is there for this; a laptop has other work. */
const GPU_SHARES = { host: 0.6, hostMax: Infinity, disk: 0.25, diskMax: 1024 * GIB };
const CPU_SHARES = { host: 0.1, hostMax: GIB, disk: 0.05, diskMax: 4 * GIB };

/** Throws TierError where more is asked for than there is. */
export function tierSizes(input: TierSizeInput): { hostBytes: number; diskBytes: number } {
  const { wantedHostBytes, totalBytes } = input;
  if (wantedHostBytes !== null && wantedHostBytes > totalBytes) {
    const [wanted, total] = [readableBytes(wantedHostBytes), readableBytes(totalBytes)];
    throw new TierError(
      `the host tier wants ${wanted}, but there are only ${total} of memory: ` +
        "give a smaller --host-memory, or --host-memory 0 for none",
    );
  }
  const shares = input.isGpu ? GPU_SHARES : CPU_SHARES;
  const hostBytes = wantedHostBytes ?? Math.min(input.freeBytes * shares.host, shares.hostMax);
  const diskBytes = input.wantedDiskBytes ?? Math.min(input.diskFreeBytes * shares.disk, shares.diskMax);
  return { hostBytes: Math.floor(hostBytes), diskBytes: Math.floor(diskBytes) };
}

/** Memory that this process may still take: what the machine has available, at most what its cgroup allows. */
export function freeMemoryBytes(root = "/"): number {
  const available = meminfoBytes(root, "MemAvailable") ?? Infinity;
  const limit = cgroupBytes(root, "memory.max", "memory.limit_in_bytes");
  const used = cgroupBytes(root, "memory.current", "memory.usage_in_bytes");
  return Math.min(available, limit === null ? Infinity : Math.max(0, limit - (used ?? 0)));
}

/** Memory of the machine, at most what its cgroup allows. */
export function totalMemoryBytes(root = "/"): number {
  return Math.min(totalmem(), cgroupBytes(root, "memory.max", "memory.limit_in_bytes") ?? Infinity);
}

/** Room for a file at `path`, what such a file takes already included; its folders need not exist yet. */
export function freeDiskBytes(path: string): number {
  let folder = dirname(path);
  while (!existsSync(folder)) folder = dirname(folder);
  const { bavail, bsize } = statfsSync(folder);
  return bavail * bsize;
}

/** Null where there is no such cgroup, or no limit. */
function cgroupBytes(root: string, name: string, formerName: string): number | null {
  const folder = `${root}sys/fs/cgroup`; // version 2, then 1
  return readNumber(`${folder}/${name}`) ?? readNumber(`${folder}/memory/${formerName}`);
}

function meminfoBytes(root: string, field: string): number | null {
  const text = readText(`${root}proc/meminfo`);
  const match = text?.match(new RegExp(`^${field}:\\s+(\\d+) kB`, "m"));
  return match === null || match === undefined ? null : Number(match[1]) * 1024;
}

/** Null where the file is not there or says "max". */
function readNumber(path: string): number | null {
  const value = Number(readText(path)?.trim());
  return Number.isFinite(value) && value > 0 ? value : null;
}

function readText(path: string): string | null {
  return existsSync(path) ? readFileSync(path, "utf8") : null;
}
