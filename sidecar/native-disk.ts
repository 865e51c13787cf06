// The disk functions of native/kvasir.h: one file with native I/O threads.

import { assertOffset, assertPositive, assertSize, cString } from "./native-arguments.ts";
import { type Device, type HostAddress, type NativeLibrary, type Pointer, Status } from "./native.ts";

export interface DiskRequest {
  readonly tag: number;
  readonly offsetBytes: number;
  readonly address: HostAddress;
  readonly bytes: number;
  /** "sync": what was completed before survives a power failure; offset, address and bytes are not used. */
  readonly operation: DiskOperation;
}

export type DiskOperation = "read" | "write" | "sync";
const DISK_OPERATION_CODES: Record<DiskOperation, number> = { read: 0, write: 1, sync: 2 };

export interface DiskCompletion {
  readonly tag: number;
  readonly checksum: bigint;
  readonly elapsedUs: number;
  readonly status: number;
}

const DISK_REQUEST_BYTES = 32;
const DISK_COMPLETION_BYTES = 24;
const DISK_BATCH = 256;

/** One preallocated, locked file with native I/O threads: requests go in, completions come out. */
export class Disk {
  readonly isDirect: boolean;
  readonly isPreallocated: boolean;
  readonly isNew: boolean;
  readonly threadCount: number;
  readonly #library: NativeLibrary;
  #handle: Pointer;
  readonly #requests = new DataView(new ArrayBuffer(DISK_REQUEST_BYTES * DISK_BATCH));
  readonly #completions = new DataView(new ArrayBuffer(DISK_COMPLETION_BYTES * DISK_BATCH));
  readonly #count = new Uint32Array(1);

  constructor(library: NativeLibrary, path: string, fileBytes: number, threadCount: number) {
    assertSize(fileBytes, "fileBytes");
    assertPositive(threadCount, "threadCount");
    const out = new BigUint64Array(1);
    const info = new Uint32Array(4);
    const status = library.symbols.kvs_disk_open(cString(path), fileBytes, threadCount, out, info);
    library.check(status);
    this.#library = library;
    this.#handle = Number(out[0]) as Pointer;
    this.isDirect = info[0] === 1;
    this.isPreallocated = info[1] === 1;
    this.isNew = info[2] === 1;
    this.threadCount = info[3]!;
  }

  /** Returns how many of the requests were taken, from the first; the rest found a full queue. */
  submit(requests: readonly DiskRequest[]): number {
    const count = Math.min(requests.length, DISK_BATCH);
    if (count === 0) return 0;
    for (let i = 0; i < count; i++) {
      const { tag, offsetBytes, address, bytes, operation } = requests[i]!;
      const at = i * DISK_REQUEST_BYTES;
      this.#requests.setBigUint64(at, BigInt(tag), true);
      this.#requests.setBigUint64(at + 8, BigInt(offsetBytes), true);
      this.#requests.setBigUint64(at + 16, BigInt(address), true);
      this.#requests.setUint32(at + 24, bytes, true);
      this.#requests.setUint32(at + 28, DISK_OPERATION_CODES[operation], true);
    }
    const view = new Uint8Array(this.#requests.buffer);
    const status = this.#library.symbols.kvs_disk_submit(this.#handle, view, count, this.#count);
    if (status !== Status.busy) this.#library.check(status);
    return this.#count[0]!;
  }

  /** Completions since the last call, at most 256. */
  reap(): DiskCompletion[] {
    const view = new Uint8Array(this.#completions.buffer);
    this.#library.check(
      this.#library.symbols.kvs_disk_reap(this.#handle, view, DISK_BATCH, this.#count),
    );
    const completions: DiskCompletion[] = [];
    for (let i = 0; i < this.#count[0]!; i++) {
      const at = i * DISK_COMPLETION_BYTES;
      completions.push({
        tag: Number(this.#completions.getBigUint64(at, true)),
        checksum: this.#completions.getBigUint64(at + 8, true),
        elapsedUs: this.#completions.getUint32(at + 16, true),
        status: this.#completions.getInt32(at + 20, true),
      });
    }
    return completions;
  }

  /** Completions wake this device's wait(). */
  wake(device: Device): void {
    this.#library.check(
      this.#library.symbols.kvs_disk_wake(this.#handle, device.handle as Pointer),
    );
  }

  /** Blocking, for start-up. */
  readNow(offsetBytes: number, destination: Uint8Array): void {
    assertOffset(offsetBytes);
    const { symbols } = this.#library;
    this.#library.check(
      symbols.kvs_disk_read_now(this.#handle, offsetBytes, destination, destination.length),
    );
  }

  /** Blocking, for start-up; durable on return. */
  writeNow(offsetBytes: number, source: Uint8Array): void {
    assertOffset(offsetBytes);
    const { symbols } = this.#library;
    this.#library.check(
      symbols.kvs_disk_write_now(this.#handle, offsetBytes, source, source.length),
    );
  }

  /** The file becomes all zeros. Blocking, for start-up; nothing may be in flight. */
  discard(): void {
    this.#library.check(this.#library.symbols.kvs_disk_discard(this.#handle));
  }

  close(timeoutUs: number): void {
    if (this.#handle === 0) return;
    const handle = this.#handle;
    this.#handle = 0 as Pointer; // gone also when requests were still in flight
    this.#library.check(this.#library.symbols.kvs_disk_close(handle, timeoutUs));
  }
}
