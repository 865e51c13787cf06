// The disk tier: blocks in the slots of one file. A slot is overwritten in the order empty header, payload, header,
// each after the other's completion, so a process that dies at any moment leaves a whole block or none. Nothing is
// synced for that: when power fails and the device lost or reordered what it had acknowledged, a header whose payload
// isn't its own fails the payload's checksum. Only erase() syncs, because what was deleted must not come back.
// Operations on one slot run one after the other; reads are verified before anyone sees them.
//
// Nothing here waits, but scan(): operations are started, and poll() says how they ended.

import { assert, AssertionError, unreachable } from "../assert.ts";
import type { DiskCompletion, DiskRequest } from "../native-disk.ts";
import { type HostAddress, type HostBuffer, Status } from "../native.ts";
import { type BlockHeader, encodeEmptyHeader, encodeHeader, fingerprintDigest, HEADER_BYTES } from "./block-header.ts";
import type { DiskIo } from "./disk-io.ts";
import { headerOffset, payloadOffset } from "./disk-layout.ts";
import { scanDisk, type ScanResult } from "./disk-scan.ts";

export type { DiskIo } from "./disk-io.ts";
export { diskFileBytes, diskSlotCount } from "./disk-layout.ts";
export type { AdoptedBlock, ScanResult } from "./disk-scan.ts";

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
export type BlockIdentity = Omit<BlockHeader, "generation" | "payloadChecksum">;

export type DiskOutcome = "ok" | "io" | "corrupt" | "timeout" | "no-space";

/**
 * How an operation ended. A "timeout" is always followed by "released", perhaps much later: until then the kernel may
 * still touch the operation's memory, and later operations on its slot wait.
 */
export interface DiskEvent {
  readonly kind: "read" | "write" | "erase" | "released";
  readonly slot: number;
  /** The operation's memory; 0 of an erase. */
  readonly address: HostAddress;
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
  /** Of the sync in flight, or 0: one at a time, also when all erases that wait for it were given up. */
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
    this.#submitReady();
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
    this.#submitReady();
  }

  /** The operation has its slot now. */
  #admit(operation: Operation, nowMs: number): void {
    if (operation.kind !== "read") this.#writers.push(operation);
    else if (this.#states[operation.slot] === SlotState.whole) this.#ready.push(operation);
    else this.#end(operation, "corrupt", nowMs); // what should be there was never completed
  }

  #submitReady(): void {
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
    this.#submitSync();
  }

  #submitSync(): void {
    if (this.#syncTag !== 0 || this.#unsynced.length === 0) return;
    const tag = this.#nextTag++;
    const request = { tag, offsetBytes: 0, address: 0 as HostAddress, bytes: 0, operation: "sync" } as const;
    if (this.io.submit([request]) === 0) return;
    this.#syncTag = tag;
    this.#syncing = this.#unsynced;
    this.#unsynced = [];
  }

  /** The native request of an operation's present phase. */
  #request(operation: Operation): DiskRequest {
    const { tag, slot, phase, address, headerBuffer } = operation;
    const { slotBytes, headerBuffers } = this.options;
    if (phase === "read" || phase === "payload") {
      const direction = phase === "read" ? "read" : "write";
      return { tag, offsetBytes: payloadOffset(slot, slotBytes), address, bytes: slotBytes, operation: direction };
    }
    this.#fillHeader(operation);
    return {
      tag,
      offsetBytes: headerOffset(slot, slotBytes),
      address: (headerBuffers.address + headerBuffer * HEADER_BYTES) as HostAddress,
      bytes: HEADER_BYTES,
      operation: "write",
    };
  }

  #fillHeader({ headerBuffer, phase, identity, checksum }: Operation): void {
    const at = headerBuffer * HEADER_BYTES;
    const bytes = this.#headerBytes.subarray(at, at + HEADER_BYTES);
    if (phase !== "header") encodeEmptyHeader(bytes);
    else {
      const header = { ...identity!, payloadChecksum: checksum, generation: this.#generation++ };
      encodeHeader(bytes, this.#digest, header);
    }
  }

  #complete({ tag, status, checksum }: DiskCompletion, nowMs: number): void {
    if (tag === this.#syncTag) return this.#completeSync(status, nowMs);
    const operation = this.#byTag.get(tag);
    assert(operation !== undefined, `a completion of request ${tag}, which is not in flight`);
    operation.isSubmitted = false;
    if (operation.isAbandoned) this.#release(operation, nowMs);
    else if (status !== Status.ok) this.#end(operation, outcomeOf(status), nowMs);
    else this.#advance(operation, checksum, nowMs);
  }

  #completeSync(status: number, nowMs: number): void {
    const synced = this.#syncing;
    this.#syncing = [];
    this.#syncTag = 0;
    for (const operation of synced) this.#end(operation, outcomeOf(status), nowMs);
  }

  /** The present phase succeeded. */
  #advance(operation: Operation, checksum: bigint, nowMs: number): void {
    const { slot } = operation;
    switch (operation.phase) {
      case "erase-first":
        this.#states[slot] = SlotState.empty;
        operation.phase = "payload";
        this.#ready.push(operation);
        return;
      case "payload":
        operation.checksum = checksum;
        operation.phase = "header";
        this.#states[slot] = SlotState.dirty;
        this.#ready.push(operation);
        return;
      case "header":
        this.#checksums[slot] = operation.checksum;
        this.#states[slot] = SlotState.whole;
        return this.#end(operation, "ok", nowMs);
      case "erase":
        this.#states[slot] = SlotState.empty;
        operation.phase = "sync";
        this.#freeHeaderBuffer(operation);
        this.#unsynced.push(operation);
        return;
      case "read":
        return this.#end(operation, checksum === this.#checksums[slot] ? "ok" : "corrupt", nowMs);
      case "sync":
        throw new AssertionError("a sync has a tag of its own");
      default:
        unreachable(operation.phase);
    }
  }

  #expire(nowMs: number): void {
    const { readTimeoutMs, writeTimeoutMs = Infinity } = this.options;
    for (const operation of this.#byTag.values()) {
      const timeoutMs = operation.kind === "read" ? readTimeoutMs : writeTimeoutMs;
      if (operation.isAbandoned || nowMs - operation.startedAtMs < timeoutMs) continue;
      this.#report(operation, operation.kind, "timeout", nowMs);
      if (operation.isSubmitted) operation.isAbandoned = true;
      else this.#release(operation, nowMs);
    }
  }

  /** A given up operation no longer uses any memory. */
  #release(operation: Operation, nowMs: number): void {
    this.#leave(operation, nowMs);
    this.#report(operation, "released", "timeout", nowMs);
  }

  #end(operation: Operation, outcome: DiskOutcome, nowMs: number): void {
    this.#report(operation, operation.kind, outcome, nowMs);
    this.#leave(operation, nowMs);
  }

  /** Takes it out of every queue; the next operation on its slot has its turn. */
  #leave(operation: Operation, nowMs: number): void {
    this.#byTag.delete(operation.tag);
    this.#freeHeaderBuffer(operation);
    for (const list of [this.#writers, this.#ready, this.#unsynced, this.#syncing]) remove(list, operation);
    const queue = this.#bySlot.get(operation.slot)!;
    const hadSlot = queue[0] === operation;
    remove(queue, operation);
    if (queue.length === 0) this.#bySlot.delete(operation.slot);
    else if (hadSlot) this.#admit(queue[0]!, nowMs);
  }

  #freeHeaderBuffer(operation: Operation): void {
    if (operation.headerBuffer === NO_BUFFER) return;
    this.#freeHeaderBuffers.push(operation.headerBuffer);
    operation.headerBuffer = NO_BUFFER;
  }

  #report(operation: Operation, kind: DiskEvent["kind"], outcome: DiskOutcome, nowMs: number): void {
    const bytes = outcome === "ok" && kind !== "erase" ? this.options.slotBytes : 0;
    const elapsedMs = nowMs - operation.startedAtMs;
    const { slot, address } = operation;
    this.#events.push({ kind, slot, address, outcome, bytes, elapsedMs });
  }
}

function outcomeOf(status: number): DiskOutcome {
  if (status === Status.ok) return "ok";
  return status === Status.noSpace ? "no-space" : "io";
}

function remove(list: Operation[], operation: Operation): void {
  const index = list.indexOf(operation);
  if (index >= 0) list.splice(index, 1);
}
