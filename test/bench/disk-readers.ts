// The ways to read blocks from a file that bench/disk.ts compares: fio, our own threads, io_uring, Bun's asynchronous
// files. Each reads random blocks, O_DIRECT, `depth` at a time, for some seconds, and returns GB/s or null.

import { constants } from "node:fs";
import { open } from "node:fs/promises";
import type { Device, HostAddress, HostBuffer } from "../../sidecar/native.ts";
import type { Disk } from "../../sidecar/native-disk.ts";

export interface ReadCase {
  readonly path: string;
  readonly fileBytes: number;
  readonly blockBytes: number;
  readonly depth: number;
  readonly seconds: number;
}

export type Reader = (read: ReadCase) => Promise<number | null>;

/** For allocations of 2 MiB or more. Reads into small pages can take twice as long: many more segments a request. */
const HUGE_PAGES = { ...process.env, GLIBC_TUNABLES: "glibc.malloc.hugetlb=1" };

/** engine psync: as many threads as `depth`; else one thread with so many requests in flight. */
function fioReader(engine: "psync" | "io_uring"): Reader {
  return async ({ path, fileBytes, blockBytes, depth, seconds }) => {
    const parallel = engine === "psync" ? ["--thread", `--numjobs=${depth}`] : [`--iodepth=${depth}`];
    const command = [
      "fio", "--name=read", `--filename=${path}`, `--size=${fileBytes}`, `--bs=${blockBytes}`, "--rw=randread",
      "--direct=1", `--ioengine=${engine}`, "--norandommap", "--randrepeat=0", "--time_based",
      `--runtime=${Math.round(seconds * 1000)}ms`, "--group_reporting", "--output-format=json", ...parallel,
    ];
    const { stdout, success } = Bun.spawnSync(command, { env: HUGE_PAGES });
    if (!success) return null;
    const report = JSON.parse(stdout.toString()) as { jobs: { read: { bw_bytes: number } }[] };
    return report.jobs[0]!.read.bw_bytes / 1e9;
  };
}

/** By name; none where fio is not installed. `program`: where it is. */
export function fioReaders(program: string | null = Bun.which("fio")): Readonly<Record<string, Reader>> {
  return program === null ? {} : { "fio, threads": fioReader("psync"), "fio, io_uring": fioReader("io_uring") };
}

/** A table's cells: GB/s by reader; those that are not fio's with their percent of the better fio, if there is one. */
export function rateCells(rates: Readonly<Record<string, number | null>>): string[] {
  const isFio = (name: string) => name.startsWith("fio");
  const fio = Math.max(0, ...Object.entries(rates).map(([name, rate]) => (isFio(name) ? (rate ?? 0) : 0)));
  return Object.entries(rates).map(([name, rate]) => {
    if (rate === null) return "-";
    return isFio(name) || fio === 0 ? rate.toFixed(2) : `${rate.toFixed(2)} (${((100 * rate) / fio).toFixed(0)} %)`;
  });
}

/** program: disk-uring.cpp, built. */
export function uringReader(program: string): Reader {
  return async ({ path, fileBytes, blockBytes, depth, seconds }) => {
    const words = [path, fileBytes, blockBytes, depth, seconds].map(String);
    const { stdout, success } = Bun.spawnSync([program, ...words]);
    return success ? Number(stdout.toString()) : null;
  };
}

/** Memory for the reads: at least depth * blockBytes. */
export function bunReader(memory: HostBuffer): Reader {
  return async ({ path, fileBytes, blockBytes, depth, seconds }) => {
    const file = await open(path, constants.O_RDONLY | constants.O_DIRECT);
    const beginMs = performance.now();
    let bytes = 0;
    let elapsedMs = 0;
    const readOn = async (buffer: Uint8Array) => {
      while (performance.now() - beginMs < seconds * 1000) {
        const { bytesRead } = await file.read(buffer, 0, blockBytes, randomOffset(fileBytes, blockBytes));
        const nowMs = performance.now();
        if (nowMs - beginMs > seconds * 1000) return;
        bytes += bytesRead;
        elapsedMs = nowMs - beginMs;
      }
    };
    const buffers = Array.from({ length: depth }, (_, i) => new Uint8Array(memory.bytes, i * blockBytes, blockBytes));
    await Promise.all(buffers.map(readOn));
    await file.close();
    return bytes / elapsedMs / 1e6;
  };
}

export interface PoolRate {
  readonly gbps: number;
  /** Mean of one request in its thread, checksum included. */
  readonly requestUs: number;
}

/** Our threads, as many as the disk was opened with, never idle; every block's checksum is computed. */
export function runPool(
  disk: Disk,
  device: Device,
  memory: HostBuffer,
  { fileBytes, blockBytes, depth, seconds }: ReadCase,
  operation: "read" | "write",
): PoolRate {
  const slots = Math.min(2 * depth, Math.floor(memory.bytes.byteLength / blockBytes));
  const submit = (slot: number) => {
    const address = (memory.address + slot * blockBytes) as HostAddress;
    disk.submit([
      { tag: slot, offsetBytes: randomOffset(fileBytes, blockBytes), address, bytes: blockBytes, operation },
    ]);
  };
  const beginMs = performance.now();
  let [blocks, requestUs, elapsedMs, inFlight] = [0, 0, 0, slots];
  for (let slot = 0; slot < slots; slot++) submit(slot);
  while (inFlight > 0) {
    device.wait(100_000);
    const isOver = elapsedMs > seconds * 1000;
    if (!isOver) elapsedMs = performance.now() - beginMs;
    for (const { tag, elapsedUs, status } of disk.reap()) {
      if (status !== 0) throw new Error(`${operation} failed: ${status}`);
      // As fio does: what ends after the time is up does not count.
      if (isOver) inFlight--;
      else {
        submit(tag);
        blocks++;
        requestUs += elapsedUs;
      }
    }
  }
  return { gbps: (blocks * blockBytes) / elapsedMs / 1e6, requestUs: requestUs / blocks };
}

function randomOffset(fileBytes: number, blockBytes: number): number {
  return Math.floor(Math.random() * Math.floor(fileBytes / blockBytes)) * blockBytes;
}
