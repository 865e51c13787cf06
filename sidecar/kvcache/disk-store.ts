// The disk tier: blocks in the slots of one file. A slot is overwritten in the order empty header, payload, header, each
// after the other's completion, so a process that dies at any moment leaves a whole block or none. Nothing
// is synced for that: when power fails and the device lost or reordered what it had acknowledged, a header whose
// payload isn't its own fails the payload's checksum. Only erase() syncs, because what was deleted must not come back.
// Operations on one slot run one after the other; reads are verified before anyone sees them.
//
// Nothing here waits, but scan(): operations are started, and poll() says how they ended.

import { assert } from "../assert.ts";
import { type DiskCompletion, type DiskRequest, type HostAddress, type HostBuffer, Status } from "../native.ts";
import type { BlockId } from "./block-hash.ts";
import { encodeEmptyHeader, encodeHeader, fingerprintDigest, HEADER_BYTES } from "./block-header.ts";
import type { DiskIo } from "./disk-io.ts";
import { headerOffset, payloadOffset } from "./disk-layout.ts";
import { scanDisk, type ScanResult } from "./disk-scan.ts";

export interface DiskStoreOptions {
  readonly slotCount: number;
  /** Multiple of 4096. */
  readonly slotBytes: number;
  readonly fingerprint: string;
  /** Host memory for headers in flight, HEADER_BYTES each; as many writes and erases run at once, the others wait. */
  readonly headerBuffers: HostBuffer;
  /** A read that takes longer, its wait for other operations included, is given up. */
  readonly readTimeoutMs: number;
  /** The same for writes and erases; without it they are never given up. */
  readonly writeTimeoutMs?: number;
}

/** What a block's header will say. `tokens` must not change before the write ended. */
export interface BlockIdentity {
  readonly id: BlockId;
  readonly parentId: BlockId;
  readonly tokens: Int32Array;
  readonly lastUsedAtMs: number;
  readonly expiresAtMs: number;
}

export type DiskOutcome = "ok" | "io" | "corrupt" | "timeout" | "no-space";

/**
 * How an operation ended. A "timeout" is always followed by "released", perhaps much later: until then the kernel may
 * still touch the operation's memory, and later operations on its slot wait.
 */
export interface DiskEvent {
  readonly kind: "read" | "write" | "erase" | "released";
  readonly slot: number;
  readonly outcome: DiskOutcome;
  /** Transferred. */
  readonly bytes: number;
  readonly elapsedMs: number;
}

type Phase = "erase-first" | "payload" | "header" | "read" | "erase" | "sync";

interface Operation {
  readonly tag: number;
  readonly slot: number;
  readonly kind: "read" | "write" | "erase";
  readonly address: HostAddress;
  readonly identity: BlockIdentity | null;
  readonly startedAtMs: number;
  phase: Phase;
  /** Index of its header buffer, or -1. */
  headerBuffer: number;
  checksum: bigint;
  /** The kernel may touch its memory. */
  isSubmitted: boolean;
  isAbandoned: boolean;
}

/** What a slot's header on disk may say. */
const SlotState = {
  /** Surely nothing. */
  empty: 0,
  /** Something that is not to be believed: a write or an erase failed. */
  dirty: 1,
  /** A block with the checksum that is kept here. */
  whole: 2,
} as const;

const NO_BUFFER = -1;

export class DiskStore {
  readonly #digest: Uint8Array;
  readonly #headerBytes: Uint8Array;
  readonly #freeHeaderBuffers: number[];
  readonly #checksums: BigUint64Array;
  readonly #states: Uint8Array;
  /** Operations of each slot, in order; the first has the slot. */
  readonly #bySlot = new Map<number, Operation[]>();
  readonly #byTag = new Map<number, Operation>();
  /** They have their slot and wait for a header buffer. */
  readonly #writers: Operation[] = [];
  /** The next request of each can be submitted. */
  readonly #ready: Operation[] = [];
  /** Erases written, and not yet synced: one sync serves all that were written before it. */
  #unsynced: Operation[] = [];
  #syncing: Operation[] = [];
  #syncTag = 0;
  #nextTag = 1;
  #generation = 1;
  #isScanned = false;
  #events: DiskEvent[] = [];

  constructor(
    readonly io: DiskIo,
    readonly options: DiskStoreOptions,
  ) {
    this.#digest = fingerprintDigest(options.fingerprint);
    this.#headerBytes = new Uint8Array(options.headerBuffers.bytes);
    const bufferCount = Math.floor(this.#headerBytes.length / HEADER_BYTES);
    assert(bufferCount > 0, "the disk tier needs a header buffer");
    this.#freeHeaderBuffers = Array.from({ length: bufferCount }, (_, i) => i);
    this.#checksums = new BigUint64Array(options.slotCount);
    this.#states = new Uint8Array(options.slotCount);
  }

  /** Not yet ended; given up ones count until the kernel has answered. */
  get operationCount(): number {
    return this.#byTag.size;
  }

  /** Writes or erases that would start at once. */
  get freeWriteCount(): number {
    return Math.max(0, this.#freeHeaderBuffers.length - this.#writers.length);
  }

  /** Reads every header; blocking, once, before anything else. Of two slots with one id the younger counts. */
  scan(): ScanResult {
    assert(!this.#isScanned, "scanned twice");
    this.#isScanned = true;
    const { slotCount, slotBytes } = this.options;
    const { dirtySlots, ...result } = scanDisk(this.io, { slotCount, slotBytes, digest: this.#digest });
    for (const slot of dirtySlots) this.#states[slot] = SlotState.dirty;
    for (const block of result.blocks) {
      this.#states[block.slot] = SlotState.whole;
      this.#checksums[block.slot] = block.payloadChecksum;
      this.#generation = Math.max(this.#generation, block.generation + 1);
    }
    return result;
  }

  /** Writes slotBytes from `address` into `slot` under this identity. The memory is left alone until the event. */
  write(slot: number, address: HostAddress, identity: BlockIdentity, nowMs: number): void {
    this.#start({ slot, kind: "write", phase: "payload", address, identity, nowMs });
  }

  /** Reads slotBytes into `address`, verified. */
  read(slot: number, address: HostAddress, nowMs: number): void {
    this.#start({ slot, kind: "read", phase: "read", address, identity: null, nowMs });
  }

  /** Makes the slot empty on disk, so that its block is gone for good, also after a power failure. */
  erase(slot: number, nowMs: number): void {
    const address = 0 as HostAddress;
    this.#start({ slot, kind: "erase", phase: "erase", address, identity: null, nowMs });
  }

  /** What ended since the last call. */
  poll(nowMs: number): DiskEvent[] {
    for (let batch = this.io.reap(); batch.length > 0; batch = this.io.reap()) {
      for (const completion of batch) this.#complete(completion, nowMs);
    }
    this.#expire(nowMs);
    this.#submitReady(nowMs);
    const events = this.#events;
    this.#events = [];
    return events;
  }

  #start(start: Pick<Operation, "slot" | "kind" | "phase" | "address" | "identity"> & { nowMs: number }): void {
    const { nowMs, ...rest } = start;
    assert(this.#isScanned, "scan() comes first");
    assert(rest.slot >= 0 && rest.slot < this.options.slotCount, `no disk slot ${rest.slot}`);
    const operation: Operation = {
      ...rest,
      tag: this.#nextTag++,
      startedAtMs: nowMs,
      headerBuffer: NO_BUFFER,
      checksum: 0n,
      isSubmitted: false,
      isAbandoned: false,
    };
    this.#byTag.set(operation.tag, operation);
    const queue = this.#bySlot.get(operation.slot);
    if (queue !== undefined) queue.push(operation);
    else {
      this.#bySlot.set(operation.slot, [operation]);
      this.#admit(operation, nowMs);
    }
    this.#submitReady(nowMs);
  }

  /** The operation has its slot now. */
  #admit(operation: Operation, nowMs: number): void {
    if (operation.kind !== "read") this.#writers.push(operation);
    else if (this.#states[operation.slot] === SlotState.whole) this.#ready.push(operation);
    else this.#end(operation, "corrupt", nowMs); // what should be there was never completed
  }

  #submitReady(nowMs: number): void {
    while (this.#writers.length > 0 && this.#freeHeaderBuffers.length > 0) {
      const operation = this.#writers.shift()!;
      operation.headerBuffer = this.#freeHeaderBuffers.pop()!;
      const { slot, kind } = operation;
      if (kind === "write" && this.#states[slot] !== SlotState.empty) operation.phase = "erase-first";
      if (this.#states[slot] === SlotState.whole) this.#states[slot] = SlotState.dirty;
      this.#ready.push(operation);
    }
    while (this.#ready.length > 0 && this.io.submit([this.#request(this.#ready[0]!)]) === 1) {
      this.#ready.shift()!.isSubmitted = true;
    }
    this.#submitSync(nowMs);
  }

  #submitSync(_nowMs: number): void {
    if (this.#syncing.length > 0 || this.#unsynced.length === 0) return;
    this.#syncTag = this.#nextTag++;
    const request = { offsetBytes: 0, address: 0 as HostAddress, bytes: 0, operation: "sync" } as const;
    if (this.io.submit([{ tag: this.#syncTag, ...request }]) === 0) return;
    this.#syncing = this.#unsynced;
    this.#unsynced = [];
  }
}
