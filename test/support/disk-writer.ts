// A process that writes and erases blocks on a real disk file until it is killed, and says on stdout, before it starts
// an operation and after it has ended, which one. Arguments: file, seed.
import { writeSync } from "node:fs";
import { HEADER_BYTES } from "../../sidecar/kvcache/block-header.ts";
import { diskFileBytes } from "../../sidecar/kvcache/disk-layout.ts";
import { DiskStore } from "../../sidecar/kvcache/disk-store.ts";
import { Disk } from "../../sidecar/native-disk.ts";
import type { Device } from "../../sidecar/native.ts";
import { cpuLibrary } from "./cpu-library.ts";
import { testIdentity } from "./disk-harness.ts";
import { SeededRandom } from "./seeded-random.ts";
import { openTinyDevice } from "./tiny-device.ts";

export const WRITER_SLOTS = 24;
export const WRITER_SLOT_BYTES = 256 * 1024;
const AT_ONCE = 12;

/** Content that says by itself whether it is whole: all of it follows from its first two words. */
export function writerContent(number: number, version: number): Uint8Array {
  const words = new Uint32Array(WRITER_SLOT_BYTES / 4);
  for (let i = 2; i < words.length; i++) words[i] = Math.imul(version * 2654435761 + number, i) ^ (i << 7);
  words.set([number, version]);
  return new Uint8Array(words.buffer);
}

/** A store on the real file, not yet scanned. */
export function openRealStore(device: Device, path: string) {
  const disk = new Disk(cpuLibrary, path, diskFileBytes(WRITER_SLOTS, WRITER_SLOT_BYTES), 6);
  disk.wake(device);
  const store = new DiskStore(disk, {
    slotCount: WRITER_SLOTS,
    slotBytes: WRITER_SLOT_BYTES,
    fingerprint: "model",
    headerBuffers: device.allocHost(8 * HEADER_BYTES),
    readTimeoutMs: 60_000,
  });
  return { disk, store };
}

function say(...words: (string | number)[]): void {
  writeSync(1, `${words.join(" ")}\n`);
}

function writeUntilKilled(path: string, seed: number): void {
  const random = new SeededRandom(seed);
  const device = openTinyDevice();
  const { store } = openRealStore(device, path);
  const memory = Array.from({ length: WRITER_SLOTS }, () => device.allocHost(WRITER_SLOT_BYTES));
  const busy = new Map<number, string>();
  store.scan();
  for (let version = seed; ; version++) {
    const slot = random.integer(0, WRITER_SLOTS - 1);
    if (!busy.has(slot) && busy.size < AT_ONCE) {
      const number = random.integer(0, 99);
      const isErase = random.next() < 0.2;
      busy.set(slot, isErase ? "erased" : `holds ${number} ${version}`);
      say("start", slot);
      if (isErase) store.erase(slot, 0);
      else {
        new Uint8Array(memory[slot]!.bytes).set(writerContent(number, version));
        store.write(slot, memory[slot]!.address, testIdentity(number), 0);
      }
    }
    if (busy.size === AT_ONCE) device.wait(100_000);
    for (const event of store.poll(0)) {
      say(event.outcome === "ok" ? "end" : "failed", event.slot, busy.get(event.slot)!);
      busy.delete(event.slot);
    }
  }
}

if (import.meta.main) writeUntilKilled(process.argv[2]!, Number(process.argv[3]));
