// The disk tier's I/O against fio at the same depth, and against what could replace it: io_uring and Bun's own
// asynchronous files. All read the same file in turns, so that they meet the same caches; the best of some rounds
// counts, because what neighbours take away says nothing about a way to read.
//
//   bun run test/bench/disk.ts [--folder .] [--gib 8] [--depths 1,8,16,32] [--blocks 256K,1M,4M,50M] [--rounds 5]

import { mkdtempSync, rmSync } from "node:fs";
import { cpus, loadavg, tmpdir } from "node:os";
import { join } from "node:path";
import { HEADER_BYTES } from "../../sidecar/kvcache/block-header.ts";
import { diskFileBytes } from "../../sidecar/kvcache/disk-layout.ts";
import { DiskStore } from "../../sidecar/kvcache/disk-store.ts";
import type { HostAddress } from "../../sidecar/native.ts";
import { Disk } from "../../sidecar/native-disk.ts";
import { cpuLibrary } from "../support/cpu-library.ts";
import { testIdentity } from "../support/disk-harness.ts";
import { openTinyDevice } from "../support/tiny-device.ts";
import { benchOptions } from "./bench-options.ts";
import { bunReader, fioReaders, rateCells, type ReadCase, type Reader, runPool, uringReader } from "./disk-readers.ts";

const values = benchOptions(import.meta.path, {
  folder: { type: "string", default: tmpdir() },
  gib: { type: "string", default: "8" },
  depths: { type: "string", default: "1,8,16,32" },
  blocks: { type: "string", default: "256K,1M,4M,50M" },
  rounds: { type: "string", default: "5" },
  seconds: { type: "string", default: "0.5" },
});
const MIB = 2 ** 20;
const fileBytes = Number(values.gib) * 1024 * MIB;
const depths = values.depths.split(",").map(Number);
const blocks = values.blocks.split(",").map((text) => Number.parseInt(text) * (text.endsWith("K") ? 1024 : MIB));
const seconds = Number(values.seconds);

using cleanup = new DisposableStack();
const folder = mkdtempSync(join(values.folder, "kvasir-bench-"));
cleanup.defer(() => rmSync(folder, { recursive: true }));
const path = join(folder, "file");
const device = openTinyDevice();
cleanup.defer(() => device.close());
const MEMORY_MAX = 1024 * MIB;
const memory = device.allocHost(Math.min(MEMORY_MAX, 2 * Math.max(...depths) * Math.max(...blocks)));

/** Larger cases are left out. */
function depthsOf(blockBytes: number): number[] {
  return depths.filter((depth) => depth * blockBytes <= MEMORY_MAX);
}

function withDisk<Result>(threads: number, use: (disk: Disk) => Result): Result {
  const disk = new Disk(cpuLibrary, path, fileBytes, threads);
  disk.wake(device);
  try {
    return use(disk);
  } finally {
    disk.close(60_000_000);
  }
}

function percent(part: number, whole: number): string {
  return `${((100 * part) / whole).toFixed(0)} %`;
}

/** Random bytes: a host may notice zeros. */
function fillFile(): number {
  const words = new Uint32Array(memory.bytes);
  for (let i = 0; i < words.length; i++) words[i] = Math.imul(i, 2654435761) ^ (Math.random() * 2 ** 32);
  const beginMs = performance.now();
  withDisk(8, (disk) => {
    const blockBytes = Math.min(16 * MIB, memory.bytes.byteLength);
    for (let at = 0; at < fileBytes; at += blockBytes) {
      const bytes = Math.min(blockBytes, fileBytes - at);
      while (disk.submit([{ tag: at, offsetBytes: at, address: memory.address, bytes, operation: "write" }]) === 0) {
        device.wait(100_000);
        disk.reap();
      }
      disk.reap();
    }
  });
  return fileBytes / (performance.now() - beginMs) / 1e6;
}

function buildUring(): string {
  const program = join(folder, "disk-uring");
  const source = join(import.meta.dir, "disk-uring.cpp");
  const { success, stderr } = Bun.spawnSync(["g++", "-std=c++20", "-O2", "-o", program, source]);
  if (!success) throw new Error(stderr.toString());
  return program;
}

const readers: Readonly<Record<string, Reader>> = {
  ...fioReaders(),
  "threads (ours)": async (read) => withDisk(read.depth, (disk) => runPool(disk, device, memory, read, "read").gbps),
  "io_uring": uringReader(buildUring()),
  "Bun files": bunReader(memory),
};

/** The readers take turns, each round in another order. */
async function compare(read: ReadCase): Promise<Record<string, number | null>> {
  const rates = new Map(Object.keys(readers).map((name) => [name, [] as number[]]));
  for (let round = 0; round < Number(values.rounds); round++) {
    const names = Object.keys(readers);
    for (let turn = 0; turn < names.length; turn++) {
      const name = names[(turn + round) % names.length]!;
      const rate = await readers[name]!(read);
      if (rate !== null) rates.get(name)!.push(rate);
    }
  }
  return Object.fromEntries([...rates].map(([name, all]) => [name, all.length === 0 ? null : Math.max(...all)]));
}

async function printReads(): Promise<void> {
  const names = Object.keys(readers);
  console.log(`\nreads, GB/s (percent of the better fio)\n\n| block | depth | ${names.join(" | ")} |`);
  console.log(`|---|---|${"---|".repeat(names.length)}`);
  for (const blockBytes of blocks) {
    for (const depth of depthsOf(blockBytes)) {
      const rates = await compare({ path, fileBytes, blockBytes, depth, seconds });
      console.log(`| ${blockBytes / 1024} KiB | ${depth} | ${rateCells(rates).join(" | ")} |`);
    }
  }
}

/** Half of the threads write at most: what that costs. */
function printWrites(): void {
  console.log("\nwrites of our threads, GB/s\n\n| block | N threads | N of 2 N write | half of N write |");
  console.log("|---|---|---|---|");
  for (const blockBytes of blocks) {
    for (const depth of depthsOf(blockBytes).filter((depth) => depth > 1)) {
      const rate = (threads: number) => {
        const write = { path, fileBytes, blockBytes, depth, seconds };
        const once = () => withDisk(threads, (disk) => runPool(disk, device, memory, write, "write").gbps);
        return Math.max(...Array.from({ length: Number(values.rounds) }, once)).toFixed(2);
      };
      console.log(`| ${blockBytes / 1024} KiB | ${depth} | ${rate(2 * depth)} | ${rate(depth)} |`);
    }
  }
}

function gbps(bytes: number, action: () => void): number {
  const rates = Array.from({ length: 9 }, () => {
    const beginMs = performance.now();
    action();
    return bytes / (performance.now() - beginMs) / 1e6;
  });
  return Math.max(...rates);
}

function printChecksum(): void {
  console.log("\nchecksum, one thread; share: of a read's time in its thread\n");
  console.log("| bytes | checksum, GB/s | memcpy, GB/s | share |");
  console.log("|---|---|---|---|");
  const half = memory.bytes.byteLength / 2;
  const [source, target] = [new Uint8Array(memory.bytes, 0, half), new Uint8Array(memory.bytes, half)];
  for (const blockBytes of blocks) {
    const times = Math.max(1, Math.floor((64 * MIB) / blockBytes));
    const each = (action: (at: number) => void) => () => {
      for (let i = 0; i < times; i++) action((i * blockBytes) % (half - blockBytes + 1));
    };
    const sum = gbps(times * blockBytes, each((at) => {
      cpuLibrary.checksum((memory.address + Math.floor(at / 4096) * 4096) as HostAddress, blockBytes);
    }));
    const copy = gbps(times * blockBytes, each((at) => target.set(source.subarray(at, at + blockBytes), at)));
    const read = { path, fileBytes, blockBytes, depth: 8, seconds };
    const { requestUs } = withDisk(8, (disk) => runPool(disk, device, memory, read, "read"));
    const share = percent(blockBytes / sum / 1000, requestUs);
    console.log(`| ${blockBytes / 1024} KiB | ${sum.toFixed(1)} | ${copy.toFixed(1)} | ${share} |`);
  }
}

/** A start reads every header: how long that takes, and what a durable erase costs. */
function printStore(): void {
  const slotBytes = 64 * 1024;
  const slotCount = Math.floor(fileBytes / (slotBytes + HEADER_BYTES)) - 512;
  rmSync(path);
  const disk = new Disk(cpuLibrary, path, diskFileBytes(slotCount, slotBytes), 8);
  disk.wake(device);
  const headerBuffers = device.allocHost(256 * HEADER_BYTES);
  const options = { slotCount, slotBytes, fingerprint: "bench", headerBuffers, readTimeoutMs: Infinity };
  const settle = (store: DiskStore) => {
    while (store.operationCount > 0) {
      device.wait(100_000);
      store.poll(0);
    }
  };
  const store = new DiskStore(disk, options);
  store.scan();
  for (let slot = 0; slot < slotCount; slot++) {
    store.write(slot, memory.address, { ...testIdentity(slot), tokens: new Int32Array(64) }, 0);
    while (store.freeWriteCount === 0) {
      device.wait(100_000);
      store.poll(0);
    }
  }
  settle(store);
  let beginMs = performance.now();
  const { blocks: found } = new DiskStore(disk, options).scan();
  const scanMs = performance.now() - beginMs;
  const perSecond = ((found.length / scanMs) * 1000).toFixed(0);
  console.log(`\nstart: ${found.length} headers in ${scanMs.toFixed(0)} ms, ${perSecond} a second`);
  for (const count of [1, 512]) {
    beginMs = performance.now();
    for (let slot = 0; slot < count; slot++) store.erase(slot, 0);
    settle(store);
    console.log(`durable erase of ${count}: ${(performance.now() - beginMs).toFixed(1)} ms`);
  }
  disk.close(60_000_000);
}

if (Bun.which("fio") === null) console.log("fio is not installed: its columns are left out (apt install fio)");
console.log(`${cpus().length} processors, load ${loadavg()[0]!.toFixed(1)} before the start`);
console.log(`file of ${values.gib} GiB, first write ${fillFile().toFixed(2)} GB/s`);
await printReads();
printWrites();
printChecksum();
printStore();
