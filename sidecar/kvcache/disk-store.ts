// The disk tier's file: a table of headers, then as many payload slots. A block is overwritten in the order empty header,
// payload, header, each after the other's completion, so that a crash at any moment leaves either a whole block
// or none; a payload that was never written fails its checksum. Reads are verified before anyone sees them.
//
// Nothing here waits: operations are started, and poll() says how they ended.

import { assert } from "../assert.ts";
import type { DiskCompletion, DiskRequest, HostAddress, HostBuffer } from "../native.ts";
import type { BlockId } from "./block-hash.ts";
import {
  type BlockHeader,
  decodeHeader,
  encodeEmptyHeader,
  encodeHeader,
  fingerprintDigest,
  HEADER_BYTES,
} from "./block-header.ts";

/** The file's I/O: native.ts's Disk; tests put faults in between. */
export interface DiskIo {
  submit(requests: readonly DiskRequest[]): number;
  reap(): DiskCompletion[];
  readNow(offsetBytes: number, destination: Uint8Array): void;
}

export interface DiskStoreOptions {
  readonly slotCount: number;
  /** Multiple of 4096. */
  readonly slotBytes: number;
  readonly fingerprint: string;
  /** Host memory for headers in flight: HEADER_BYTES each; as many writes can run at once. */
  readonly headerBuffers: HostBuffer;
  /** A read that takes longer is given up; its slot and memory stay untouched until the kernel answers. */
  readonly readTimeoutMs: number;
}

/** What a block's header will say. */
export type BlockIdentity = Omit<BlockHeader, "generation" | "payloadChecksum">;

export type DiskOutcome = "ok" | "io" | "corrupt" | "timeout" | "no-space";

/** How an operation ended. After "timeout" of a read a second event "released" follows once its memory is free again. */
export interface DiskEvent {
  readonly kind: "read" | "write" | "erase" | "released";
  readonly slot: number;
  readonly outcome: DiskOutcome;
  readonly bytes: number;
  readonly elapsedMs: number;
}

export interface AdoptedBlock extends BlockHeader {
  readonly slot: number;
}

export interface ScanResult {
  readonly blocks: AdoptedBlock[];
  readonly dropped: { version: number; fingerprint: number; corrupt: number };
}

type Phase = "erase-first" | "payload" | "header" | "read" | "erase";

interface Operation {
  readonly slot: number;
  readonly kind: "read" | "write" | "erase";
  phase: Phase;
  readonly address: HostAddress;
  readonly identity: BlockIdentity | null;
  readonly startedAtMs: number;
  headerBuffer: number;
  checksum: bigint;
  isAbandoned: boolean;
}

const KERNEL_NO_SPACE = -6;
const SCAN_HEADERS = 1024;

export function diskFileBytes(slotCount: number, slotBytes: number): number {
  return slotCount * (HEADER_BYTES + slotBytes);
}

export class DiskStore {
  readonly #digest: Uint8Array;
  readonly #headerBytes: Uint8Array;
  readonly #freeHeaderBuffers: number[];
  readonly #checksums: BigUint64Array;
  /** 1: the header on disk is, or may be, not empty. */
  readonly #hasHeader: Uint8Array;
  readonly #operations = new Map<number, Operation>();
  /** Requests that found the native queue full, or no header buffer, in order. */
  readonly #backlog: number[] = [];
  #nextTag = 1;
  #generation = 1;
  readonly #events: DiskEvent[] = [];

  constructor(
    readonly io: DiskIo,
    readonly options: DiskStoreOptions,
  ) {
    this.#digest = fingerprintDigest(options.fingerprint);
    this.#headerBytes = new Uint8Array(options.headerBuffers.bytes);
    const bufferCount = Math.floor(this.#headerBytes.length / HEADER_BYTES);
    this.#freeHeaderBuffers = Array.from({ length: bufferCount }, (_, i) => i);
    this.#checksums = new BigUint64Array(options.slotCount);
    this.#hasHeader = new Uint8Array(options.slotCount);
  }

  get operationCount(): number {
    return this.#operations.size;
  }

  /** Reads every header. Blocking; once, at start. Of two slots with one id the younger counts. */
  scan(): ScanResult {
    const dropped = { version: 0, fingerprint: 0, corrupt: 0 };
    const byId = new Map<BlockId, AdoptedBlock>();
    const buffer = new Uint8Array(SCAN_HEADERS * HEADER_BYTES);
    for (let first = 0; first < this.options.slotCount; first += SCAN_HEADERS) {
      const count = Math.min(SCAN_HEADERS, this.options.slotCount - first);
      const part = buffer.subarray(0, count * HEADER_BYTES);
      this.io.readNow(first * HEADER_BYTES, part);
      for (let i = 0; i < count; i++) {
        const header = decodeHeader(
          part.subarray(i * HEADER_BYTES, (i + 1) * HEADER_BYTES),
          this.#digest,
        );
        if (header === "empty") continue;
        this.#hasHeader[first + i] = 1;
        if (typeof header === "string") dropped[header]++;
        else this.#adopt(byId, { ...header, slot: first + i });
      }
    }
    return { blocks: [...byId.values()], dropped };
  }

  /** Writes slotBytes from `address` into `slot` under this identity. The memory is left alone until the event. */
  write(slot: number, address: HostAddress, identity: BlockIdentity, nowMs: number): void {
    const phase = this.#hasHeader[slot] === 1 ? "erase-first" : "payload";
    this.#start({ slot, kind: "write", phase, address, identity, nowMs });
  }

  /** Reads slotBytes into `address`, verified. */
  read(slot: number, address: HostAddress, nowMs: number): void {
    this.#start({ slot, kind: "read", phase: "read", address, identity: null, nowMs });
  }

  /** Makes the slot empty on disk, so that its block is gone for good. */
  erase(slot: number, nowMs: number): void {
    const address = 0 as HostAddress;
    this.#start({ slot, kind: "erase", phase: "erase", address, identity: null, nowMs });
  }

  /** What ended since the last call. */
  poll(nowMs: number): DiskEvent[] {
    for (const completion of this.io.reap()) this.#complete(completion, nowMs);
    this.#expireReads(nowMs);
    this.#submitBacklog();
    return this.#events.splice(0);
  }

  #adopt(byId: Map<BlockId, AdoptedBlock>, block: AdoptedBlock): void {
    this.#generation = Math.max(this.#generation, block.generation + 1);
    this.#checksums[block.slot] = block.payloadChecksum;
    const other = byId.get(block.id);
    if (other === undefined || other.generation < block.generation) byId.set(block.id, block);
  }

  #start(start: {
    slot: number;
    kind: Operation["kind"];
    phase: Phase;
    address: HostAddress;
    identity: BlockIdentity | null;
    nowMs: number;
  }): void {
    assert(start.slot >= 0 && start.slot < this.options.slotCount, `no disk slot ${start.slot}`);
    const tag = this.#nextTag++;
    const { nowMs, ...rest } = start;
    this.#operations.set(tag, {
      ...rest,
      startedAtMs: nowMs,
      headerBuffer: -1,
      checksum: 0n,
      isAbandoned: false,
    });
    this.#backlog.push(tag);
    this.#submitBacklog();
  }

  #submitBacklog(): void {
    while (this.#backlog.length > 0) {
      const tag = this.#backlog[0]!;
      const request = this.#request(tag);
      if (request === null || this.io.submit([request]) === 0) return;
      this.#backlog.shift();
    }
  }

  /** The native request of an operation's present phase; null while no header buffer is free. */
  #request(tag: number): DiskRequest | null {
    const operation = this.#operations.get(tag)!;
    const { slot, phase, address } = operation;
    if (phase === "read" || phase === "payload") {
      const { slotBytes, slotCount } = this.options;
      return {
        tag,
        offsetBytes: slotCount * HEADER_BYTES + slot * slotBytes,
        address,
        bytes: slotBytes,
        operation: phase === "read" ? "read" : "write",
      };
    }
    if (operation.headerBuffer < 0) {
      const buffer = this.#freeHeaderBuffers.pop();
      if (buffer === undefined) return null;
      operation.headerBuffer = buffer;
    }
    this.#fillHeader(operation);
    return {
      tag,
      offsetBytes: slot * HEADER_BYTES,
      address: (this.options.headerBuffers.address + operation.headerBuffer * HEADER_BYTES) as HostAddress,
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
    const operation = this.#operations.get(tag);
    if (operation === undefined) return;
    if (operation.isAbandoned) {
      this.#end(tag, operation, "released", "timeout", nowMs);
      return;
    }
    if (status !== 0) {
      this.#end(tag, operation, operation.kind, status === KERNEL_NO_SPACE ? "no-space" : "io", nowMs);
      return;
    }
    this.#advance(tag, operation, checksum, nowMs);
  }

  /** The present phase succeeded. */
  #advance(tag: number, operation: Operation, checksum: bigint, nowMs: number): void {
    const { slot, phase } = operation;
    switch (phase) {
      case "erase-first":
        this.#hasHeader[slot] = 0;
        operation.phase = "payload";
        this.#backlog.push(tag);
        return;
      case "payload":
        operation.checksum = checksum;
        operation.phase = "header";
        this.#hasHeader[slot] = 1;
        this.#backlog.push(tag);
        return;
      case "header":
        this.#checksums[slot] = operation.checksum;
        break;
      case "erase":
        this.#hasHeader[slot] = 0;
        break;
      case "read":
        break;
    }
    const isWhole = phase !== "read" || checksum === this.#checksums[slot];
    this.#end(tag, operation, operation.kind, isWhole ? "ok" : "corrupt", nowMs);
  }

  #end(
    tag: number,
    operation: Operation,
    kind: DiskEvent["kind"],
    outcome: DiskOutcome,
    nowMs: number,
  ): void {
    this.#operations.delete(tag);
    if (operation.headerBuffer >= 0) this.#freeHeaderBuffers.push(operation.headerBuffer);
    this.#events.push({
      kind,
      slot: operation.slot,
      outcome,
      bytes: operation.kind === "erase" ? 0 : this.options.slotBytes,
      elapsedMs: nowMs - operation.startedAtMs,
    });
  }

  #expireReads(nowMs: number): void {
    for (const [tag, operation] of this.#operations) {
      if (operation.kind !== "read" || operation.isAbandoned) continue;
      if (nowMs - operation.startedAtMs < this.options.readTimeoutMs) continue;
      const waiting = this.#backlog.indexOf(tag);
      if (waiting >= 0) {
        this.#backlog.splice(waiting, 1);
        this.#end(tag, operation, "read", "timeout", nowMs);
        continue;
      }
      operation.isAbandoned = true;
      this.#events.push({
        kind: "read",
        slot: operation.slot,
        outcome: "timeout",
        bytes: 0,
        elapsedMs: nowMs - operation.startedAtMs,
      });
    }
  }
}
