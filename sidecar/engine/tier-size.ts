// How large the tiers below the gpu are when nobody says: a share of what this machine, or the cgroup it runs in, has
// free.

import { existsSync, readFileSync, statfsSync } from "node:fs";
import { dirname } from "node:path";

export interface TierSizeInput {
  /** --host-memory and --disk, in bytes; null: choose. */
  readonly wantedHostBytes: number | null;
  readonly wantedDiskBytes: number | null;
  readonly isGpu: boolean;
  /** Memory that this process may still take. */
  readonly freeBytes: number;
  /** Room on the file system of the disk tier's file. */
  readonly diskFreeBytes: number;
}

const GIB = 2 ** 30;
/** Of free memory and free disk. A GPU box is there for this; a laptop has other work. */
const GPU_SHARES = { host: 0.6, hostMax: Infinity, disk: 0.25, diskMax: 1024 * GIB };
const CPU_SHARES = { host: 0.1, hostMax: GIB, disk: 0.05, diskMax: 4 * GIB };

export function tierSizes(input: TierSizeInput): { hostBytes: number; diskBytes: number } {
  const shares = input.isGpu ? GPU_SHARES : CPU_SHARES;
  const hostBytes = input.wantedHostBytes ?? Math.min(input.freeBytes * shares.host, shares.hostMax);
  const diskBytes = input.wantedDiskBytes ?? Math.min(input.diskFreeBytes * shares.disk, shares.diskMax);
  return { hostBytes: Math.floor(hostBytes), diskBytes: Math.floor(diskBytes) };
}

/** Memory that this process may still take: what the machine has available, at most what its cgroup allows. */
export function freeMemoryBytes(root = "/"): number {
  const available = meminfoBytes(root, "MemAvailable") ?? Infinity;
  const cgroup = `${root}sys/fs/cgroup`; // version 2, then 1
  const limit = readNumber(`${cgroup}/memory.max`) ?? readNumber(`${cgroup}/memory/memory.limit_in_bytes`);
  const used = readNumber(`${cgroup}/memory.current`) ?? readNumber(`${cgroup}/memory/memory.usage_in_bytes`);
  return Math.min(available, limit === null ? Infinity : Math.max(0, limit - (used ?? 0)));
}

/** Room for a file at `path`, what such a file takes already included; its folders need not exist yet. */
export function freeDiskBytes(path: string): number {
  let folder = dirname(path);
  while (!existsSync(folder)) folder = dirname(folder);
  const { bavail, bsize } = statfsSync(folder);
  return bavail * bsize;
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
