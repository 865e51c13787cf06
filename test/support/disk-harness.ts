// A disk store on a faulty disk, with memory that is overwritten as soon as the store says that it is done with it.

import type { BlockId } from "../../sidecar/kvcache/block-hash.ts";
import { HEADER_BYTES } from "../../sidecar/kvcache/block-header.ts";
import { diskFileBytes } from "../../sidecar/kvcache/disk-layout.ts";
import { type BlockIdentity, type DiskEvent, DiskStore, type ScanResult } from "../../sidecar/kvcache/disk-store.ts";
import type { HostBuffer } from "../../sidecar/native.ts";
import { DiskMedium } from "./disk-medium.ts";
import { FakeHostMemory, FaultyDisk } from "./faulty-disk.ts";
import { SeededRandom } from "./seeded-random.ts";

export interface HarnessOptions {
  readonly random?: SeededRandom;
  readonly medium?: DiskMedium;
  readonly slotCount?: number;
  readonly slotBytes?: number;
  readonly fingerprint?: string;
  readonly headerBuffers?: number;
  readonly queueCapacity?: number;
  readonly readTimeoutMs?: number;
  readonly writeTimeoutMs?: number;
}

/** A made-up block id: 16 latin1 characters. */
export function testId(number: number): BlockId {
  return String(number).padStart(16, "#") as BlockId;
}

export function testIdentity(number: number): BlockIdentity {
  return {
    id: testId(number),
    parentId: testId(number + 1000),
    prefixCheck: BigInt(number),
    depth: number,
    tokens: Int32Array.of(number, number + 1, -number),
    lastUsedAtMs: 5000 + number,
    expiresAtMs: 9000 + number,
  };
}

export class DiskHarness {
  readonly random: SeededRandom;
  readonly medium: DiskMedium;
  readonly memory = new FakeHostMemory();
  readonly disk: FaultyDisk;
  readonly store: DiskStore;
  readonly slotCount: number;
  readonly slotBytes: number;
  nowMs = 0;
  readonly #free: HostBuffer[] = [];

  constructor(options: HarnessOptions = {}) {
    const { slotCount = 4, slotBytes = 8192, fingerprint = "model", headerBuffers = 2 } = options;
    this.random = options.random ?? new SeededRandom(1);
    this.medium = options.medium ?? new DiskMedium();
    this.medium.truncate(diskFileBytes(slotCount, slotBytes));
    this.slotCount = slotCount;
    this.slotBytes = slotBytes;
    this.disk = new FaultyDisk({ ...options, random: this.random, medium: this.medium, memory: this.memory.view });
    this.store = new DiskStore(this.disk, {
      slotCount,
      slotBytes,
      fingerprint,
      headerBuffers: this.memory.allocate(headerBuffers * HEADER_BYTES),
      readTimeoutMs: options.readTimeoutMs ?? Infinity,
      writeTimeoutMs: options.writeTimeoutMs ?? Infinity,
    });
  }

  /** A started store. */
  static open(options: HarnessOptions = {}): DiskHarness & { readonly scanned: ScanResult } {
    const harness = new DiskHarness(options);
    return Object.assign(harness, { scanned: harness.store.scan() });
  }

  /** Memory for one slot; give it back when the kernel is done with it. */
  takeBuffer(content: Uint8Array | null = null): HostBuffer {
    const buffer = this.#free.pop() ?? this.memory.allocate(this.slotBytes);
    const bytes = new Uint8Array(buffer.bytes);
    if (content === null) bytes.fill(0xee);
    else bytes.set(content);
    return buffer;
  }

  giveBuffer(buffer: HostBuffer): void {
    new Uint8Array(buffer.bytes).fill(0xdd);
    this.#free.push(buffer);
  }

  randomContent(): Uint8Array {
    const words = new Uint32Array(this.slotBytes / 4).map(() => this.random.next() * 2 ** 32);
    return new Uint8Array(words.buffer);
  }

  /** Time passes. */
  poll(): DiskEvent[] {
    return this.store.poll(++this.nowMs);
  }

  /** Polls until nothing is in flight; time stands still. */
  settle(): DiskEvent[] {
    const events: DiskEvent[] = [];
    for (let polls = 0; this.store.operationCount > 0; polls++) {
      if (polls > 10_000) throw new Error("operations do not end");
      events.push(...this.store.poll(this.nowMs));
    }
    events.push(...this.store.poll(this.nowMs));
    return events;
  }

  write(slot: number, number: number, content: Uint8Array): DiskEvent {
    const buffer = this.takeBuffer(content);
    this.store.write(slot, buffer.address, testIdentity(number), this.nowMs);
    const event = this.settle().find((event) => event.slot === slot && event.kind === "write")!;
    this.giveBuffer(buffer);
    return event;
  }

  erase(slot: number): DiskEvent {
    this.store.erase(slot, this.nowMs);
    return this.settle().find((event) => event.slot === slot && event.kind === "erase")!;
  }

  read(slot: number): { event: DiskEvent; content: Uint8Array } {
    const buffer = this.takeBuffer();
    this.store.read(slot, buffer.address, this.nowMs);
    const event = this.settle().find((event) => event.slot === slot && event.kind === "read")!;
    const content = new Uint8Array(buffer.bytes).slice();
    this.giveBuffer(buffer);
    return { event, content };
  }
}
