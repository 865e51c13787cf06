// What a start finds in the disk tier's file. The headers are the only index; what isn't believed is emptied at
// once, so that nothing comes back later that nobody knew of, not even an older copy of a block deleted in between.

import { NativeError } from "../native.ts";
import type { BlockId } from "./block-hash.ts";
import { type BlockHeader, decodeHeader, HEADER_BYTES, type HeaderFault } from "./block-header.ts";
import type { DiskIo } from "./disk-io.ts";
import {
  diskFileBytes,
  diskSlotCount,
  encodeFilePage,
  type FileOwner,
  GROUP_HEADER_BYTES,
  GROUP_SLOTS,
  headerOffset,
  readFilePage,
  readFormerPage,
} from "./disk-layout.ts";
import type { FormerBlocks } from "./lost-blocks.ts";

export interface AdoptedBlock extends BlockHeader {
  readonly slot: number;
}

export interface ScanResult {
  /** One per id. Believed as far as headers go; the payload is verified by read(). */
  readonly blocks: AdoptedBlock[];
  /** Headers that were not believed, by reason; duplicate: an older copy; outside: the file was cut. */
  readonly dropped: Record<Exclude<HeaderFault, "empty"> | "unreadable" | "duplicate" | "outside", number>;
  /** Why everything was dropped, or null. "new": there was nothing. */
  readonly discarded: Exclude<FileOwner, "ours"> | null;
  /** What was dropped for being of another fingerprint. */
  readonly former: FormerBlocks | null;
}

export interface ScanOptions {
  readonly slotCount: number;
  readonly slotBytes: number;
  readonly digest: Uint8Array;
}

const NOTHING_DROPPED: ScanResult["dropped"] = {
  version: 0, fingerprint: 0, corrupt: 0, unreadable: 0, duplicate: 0, outside: 0,
};

/** Also returns the slots whose header should be empty and could not be made so. */
export function scanDisk(io: DiskIo, options: ScanOptions): ScanResult & { readonly dirtySlots: number[] } {
  const page = new Uint8Array(HEADER_BYTES);
  const isReadable = readPart(io, 0, page);
  const owner = isReadable ? readFilePage(page, options.slotBytes, options.digest) : "corrupt";
  if (owner === "ours") {
    const scan = new HeaderScan(io, options);
    scan.readAll();
    const { dropped } = scan;
    return { blocks: scan.blocks(), dropped, discarded: null, former: null, dirtySlots: scan.clearDropped() };
  }
  const former = owner === "fingerprint" ? readFormer(io, page, options) : null;
  takeOver(io, options);
  const dropped = { ...NOTHING_DROPPED, fingerprint: former?.ids.length ?? 0 };
  return { blocks: [], dropped, discarded: owner, former, dirtySlots: [] };
}

/** What lay under another fingerprint is not used, but known by name: whose conversations miss it can then be told. */
function readFormer(io: DiskIo, page: Uint8Array, options: ScanOptions): FormerBlocks {
  const { slotBytes, digest } = readFormerPage(page);
  const slotCount = diskSlotCount(diskFileBytes(options.slotCount, options.slotBytes), slotBytes);
  const scan = new HeaderScan(io, { slotCount, slotBytes, digest });
  scan.readAll();
  return { digest, ids: scan.blocks().map(({ id }) => id) };
}

/** Afterwards the file is ours and empty. The first page is durable before any header can be. */
function takeOver(io: DiskIo, { slotBytes, digest }: ScanOptions): void {
  io.discard();
  io.writeNow(0, encodeFilePage(slotBytes, digest));
}

class HeaderScan {
  readonly dropped = { ...NOTHING_DROPPED };
  readonly #byId = new Map<BlockId, AdoptedBlock>();
  readonly #toClear: number[] = [];
  readonly #part = new Uint8Array(GROUP_HEADER_BYTES);

  constructor(
    readonly io: DiskIo,
    readonly options: ScanOptions,
  ) {}

  blocks(): AdoptedBlock[] {
    return [...this.#byId.values()];
  }

  readAll(): void {
    const zeros = new Uint8Array(GROUP_HEADER_BYTES);
    for (let first = 0; first < this.options.slotCount; first += GROUP_SLOTS) {
      if (!readPart(this.io, headerOffset(first, this.options.slotBytes), this.#part)) this.#readOneByOne(first);
      else if (Buffer.compare(this.#part, zeros) !== 0) {
        for (let i = 0; i < GROUP_SLOTS; i++) this.#judge(first + i, this.#header(i));
      }
    }
  }

  /** Empties what was dropped, neighbours at once; returns the slots where that failed. */
  clearDropped(): number[] {
    const slots = this.#toClear.toSorted((a, b) => a - b);
    const failed: number[] = [];
    for (let begin = 0, end = 0; begin < slots.length; begin = end) {
      const first = slots[begin]!;
      const groupEnd = (Math.floor(first / GROUP_SLOTS) + 1) * GROUP_SLOTS;
      while (end < slots.length && slots[end] === first + end - begin && slots[end]! < groupEnd) end++;
      if (!this.#clear(first, end - begin)) failed.push(...slots.slice(begin, end));
    }
    return failed.filter((slot) => slot < this.options.slotCount);
  }

  #readOneByOne(first: number): void {
    for (let i = 0; i < GROUP_SLOTS; i++) {
      const header = this.#header(i);
      if (readPart(this.io, headerOffset(first + i, this.options.slotBytes), header)) this.#judge(first + i, header);
      else this.#drop(first + i, "unreadable");
    }
  }

  #header(i: number): Uint8Array {
    return this.#part.subarray(i * HEADER_BYTES, (i + 1) * HEADER_BYTES);
  }

  #judge(slot: number, bytes: Uint8Array): void {
    const header = decodeHeader(bytes, this.options.digest);
    if (header === "empty") return;
    if (slot >= this.options.slotCount) return this.#drop(slot, "outside");
    if (typeof header === "string") return this.#drop(slot, header);
    const other = this.#byId.get(header.id);
    if (other !== undefined && other.generation > header.generation) return this.#drop(slot, "duplicate");
    if (other !== undefined) this.#drop(other.slot, "duplicate");
    this.#byId.set(header.id, { ...header, slot });
  }

  #drop(slot: number, reason: keyof ScanResult["dropped"]): void {
    this.dropped[reason]++;
    this.#toClear.push(slot);
  }

  #clear(first: number, count: number): boolean {
    const offsetBytes = headerOffset(first, this.options.slotBytes);
    return succeeds(() => this.io.writeNow(offsetBytes, new Uint8Array(count * HEADER_BYTES)));
  }
}

function readPart(io: DiskIo, offsetBytes: number, destination: Uint8Array): boolean {
  return succeeds(() => io.readNow(offsetBytes, destination));
}

/** False when the medium failed. */
function succeeds(access: () => void): boolean {
  try {
    access();
    return true;
  } catch (error) {
    if (error instanceof NativeError) return false;
    throw error;
  }
}
