// A disk in memory that does what disks do on bad days: requests end out of order, late, never, or with an error
// after half of their pages; bits flip; room runs out. It reads and writes the caller's memory page by page while a
// request is in flight, as DMA does, so memory that is reused too early shows.

import type { DiskIo } from "../../sidecar/kvcache/disk-io.ts";
import type { DiskCompletion, DiskRequest } from "../../sidecar/native-disk.ts";
import { type HostAddress, type HostBuffer, NativeError, Status } from "../../sidecar/native.ts";
import { DiskMedium, PAGE_BYTES } from "./disk-medium.ts";
import type { SeededRandom } from "./seeded-random.ts";

/** Probabilities, each of one request. */
export interface DiskFaults {
  /** Nothing is transferred. */
  readonly io: number;
  /** Of writes. */
  readonly noSpace: number;
  /** Of writes: some pages are written, then an error. */
  readonly torn: number;
  /** Of writes: some pages are written, and success is reported. */
  readonly lie: number;
  /** Of reads: one bit arrives wrong. */
  readonly flip: number;
  /** It does not end before release(). */
  readonly hang: number;
}

export const NO_FAULTS: DiskFaults = { io: 0, noSpace: 0, torn: 0, lie: 0, flip: 0, hang: 0 };

type Fate = keyof DiskFaults | "ok";
const FATES: Readonly<Record<DiskRequest["operation"], readonly (keyof DiskFaults)[]>> = {
  read: ["io", "flip", "hang"],
  write: ["io", "noSpace", "torn", "lie", "hang"],
  sync: ["io", "hang"],
};
const STATUS: Readonly<Record<Fate, number>> = {
  ok: Status.ok,
  lie: Status.ok,
  flip: Status.ok,
  hang: Status.ok,
  io: Status.io,
  torn: Status.io,
  noSpace: Status.noSpace,
};

interface Flight {
  readonly request: DiskRequest;
  readonly fate: Fate;
  readonly checksum: bigint;
  /** Indices within the request, in the order in which they will be transferred. */
  readonly pagesLeft: number[];
  /** Of a sync. */
  readonly syncPoint: ReadonlyMap<number, number>;
  isHanging: boolean;
}

export interface FaultyDiskOptions {
  readonly random: SeededRandom;
  readonly medium: DiskMedium;
  /** The bytes at an address. */
  readonly memory: (address: HostAddress, bytes: number) => Uint8Array;
  readonly queueCapacity?: number;
  readonly checksum?: (bytes: Uint8Array) => bigint;
}

export class FaultyDisk implements DiskIo {
  faults = NO_FAULTS;
  /** Requests by how they ended, to show that a test met what it is about. */
  readonly fates: Record<Fate, number> = { ok: 0, io: 0, noSpace: 0, torn: 0, lie: 0, flip: 0, hang: 0 };
  readonly #flights: Flight[] = [];
  readonly #random: SeededRandom;
  readonly #checksum: (bytes: Uint8Array) => bigint;

  constructor(readonly options: FaultyDiskOptions) {
    this.#random = options.random;
    this.#checksum = options.checksum ?? ((bytes) => Bun.hash.xxHash64(bytes));
  }

  get inFlight(): number {
    return this.#flights.length;
  }

  submit(requests: readonly DiskRequest[]): number {
    const room = (this.options.queueCapacity ?? 64) - this.#flights.length;
    const taken = requests.slice(0, Math.max(0, room));
    for (const request of taken) this.#flights.push(this.#launch(request));
    return taken.length;
  }

  /** Some time passes: each request may make progress, and those that are through are returned, in any order. */
  reap(): DiskCompletion[] {
    const completions: DiskCompletion[] = [];
    for (const flight of this.#random.shuffled(this.#flights)) {
      if (flight.isHanging) continue;
      this.#progress(flight, this.#random.integer(0, flight.pagesLeft.length));
      if (flight.pagesLeft.length > 0 || this.#random.next() < 0.3) continue;
      this.#flights.splice(this.#flights.indexOf(flight), 1);
      completions.push(this.#land(flight));
    }
    return completions;
  }

  /** What hangs goes on. */
  release(): void {
    for (const flight of this.#flights) flight.isHanging = false;
  }

  readNow(offsetBytes: number, destination: Uint8Array): void {
    this.#fail("read");
    this.options.medium.read(offsetBytes, destination);
  }

  writeNow(offsetBytes: number, source: Uint8Array): void {
    this.#fail("write");
    for (let at = 0; at < source.length; at += PAGE_BYTES) {
      this.options.medium.writePage((offsetBytes + at) / PAGE_BYTES, source.subarray(at, at + PAGE_BYTES));
    }
    this.options.medium.sync();
  }

  discard(): void {
    this.options.medium.discard();
  }

  /** The medium as the next process finds it; requests in flight may still have done a part of their work. */
  crash(kind: "kill" | "power failure"): DiskMedium {
    for (const flight of this.#flights) this.#progress(flight, this.#random.integer(0, flight.pagesLeft.length));
    const { medium } = this.options;
    return kind === "kill" ? medium.afterKill() : medium.afterPowerFailure(this.#random);
  }

  #launch(request: DiskRequest): Flight {
    const fate = this.#fate(FATES[request.operation]);
    const pages = Array.from({ length: request.bytes / PAGE_BYTES }, (_, i) => i);
    const { operation, address, bytes } = request;
    return {
      request,
      fate,
      checksum: operation === "write" ? this.#checksum(this.options.memory(address, bytes)) : 0n,
      pagesLeft: fate === "io" || fate === "noSpace" ? [] : this.#random.shuffled(pages),
      syncPoint: operation === "sync" ? this.options.medium.syncPoint() : new Map(),
      isHanging: fate === "hang",
    };
  }

  #fate(fates: readonly (keyof DiskFaults)[]): Fate {
    return fates.find((fate) => this.#random.next() < this.faults[fate]) ?? "ok";
  }

  #progress({ request, fate, pagesLeft }: Flight, count: number): void {
    for (const page of pagesLeft.splice(0, count)) {
      const isLost = (fate === "torn" || fate === "lie") && this.#random.next() < 0.5;
      if (!isLost) this.#transferPage(request, page);
    }
  }

  #transferPage({ operation, offsetBytes, address, bytes }: DiskRequest, page: number): void {
    const memory = this.options.memory(address, bytes).subarray(page * PAGE_BYTES, (page + 1) * PAGE_BYTES);
    const at = offsetBytes + page * PAGE_BYTES;
    if (operation === "read") this.options.medium.read(at, memory);
    else this.options.medium.writePage(at / PAGE_BYTES, memory);
  }

  #land({ request, fate, checksum, syncPoint }: Flight): DiskCompletion {
    this.fates[fate]++;
    const { tag, operation, address, bytes } = request;
    const completion = { tag, elapsedUs: 0, status: STATUS[fate] };
    if (operation === "sync" && completion.status === Status.ok) this.options.medium.sync(syncPoint);
    if (operation !== "read") return { ...completion, checksum };
    const memory = this.options.memory(address, bytes);
    if (fate === "flip") memory[this.#random.integer(0, bytes - 1)]! ^= 1 << this.#random.integer(0, 7);
    return { ...completion, checksum: this.#checksum(memory) };
  }

  #fail(operation: "read" | "write"): void {
    if (this.#random.next() >= this.faults.io) return;
    throw new NativeError(Status.io, `${operation} failed`);
  }
}

/** Host memory at made-up addresses. */
export class FakeHostMemory {
  readonly #buffers: HostBuffer[] = [];
  #nextAddress = PAGE_BYTES;

  allocate(bytes: number): HostBuffer {
    const buffer = { address: this.#nextAddress as HostAddress, bytes: new ArrayBuffer(bytes) };
    this.#nextAddress += Math.ceil(bytes / PAGE_BYTES + 1) * PAGE_BYTES;
    this.#buffers.push(buffer);
    return buffer;
  }

  readonly view = (address: HostAddress, bytes: number): Uint8Array => {
    const buffer = this.#buffers.find(
      (buffer) => address >= buffer.address && address + bytes <= buffer.address + buffer.bytes.byteLength,
    );
    if (buffer === undefined) throw new Error(`${bytes} bytes at ${address} are nobody's memory`);
    return new Uint8Array(buffer.bytes, address - buffer.address, bytes);
  };
}
