// Where things lie in the disk tier's file: one page that says whose file it is, then groups of GROUP_SLOTS
// headers with as many payloads behind them. So every slot keeps its place when the file grows or shrinks, and
// headers still lie dense enough to be read at start in few large pieces.

import { FORMAT_VERSION, HEADER_BYTES } from "./block-header.ts";
import { readableBytes } from "./readable-bytes.ts";

export const GROUP_SLOTS = 256;
export const GROUP_HEADER_BYTES = GROUP_SLOTS * HEADER_BYTES;
/** Each slot costs memory in the index and 4 KiB to read at start: with tiny blocks this is the limit, not the disk. */
export const DISK_SLOTS_MAX = 2 ** 20;

/** All numbers little-endian. The place of magic, version and checksum never changes. */
const AT = {
  magic: 0, // 8 bytes
  version: 8, // u32
  slotBytes: 16, // u64
  fingerprint: 24, // 32 bytes
  checksum: HEADER_BYTES - 8, // u64 over everything before it
} as const;

const DIGEST_BYTES = 32;
const MAGIC = new TextEncoder().encode("KVSCACHE");

/** Bytes of the file that holds so many slots. */
export function diskFileBytes(slotCount: number, slotBytes: number): number {
  const headerBytes = HEADER_BYTES + Math.ceil(slotCount / GROUP_SLOTS) * GROUP_HEADER_BYTES;
  return headerBytes + slotCount * slotBytes;
}

/** The most slots whose file is at most `fileBytes`. */
export function diskSlotCount(fileBytes: number, slotBytes: number): number {
  const groupBytes = GROUP_HEADER_BYTES + GROUP_SLOTS * slotBytes;
  const usable = Math.max(0, fileBytes - HEADER_BYTES);
  const groups = Math.floor(usable / groupBytes);
  const rest = Math.max(0, usable - groups * groupBytes - GROUP_HEADER_BYTES);
  return Math.min(groups * GROUP_SLOTS + Math.floor(rest / slotBytes), DISK_SLOTS_MAX);
}

/** Says that a tier of so many bytes would have more slots than it may, and what is used of it; null: it would not. */
export function describeDiskLimit(fileBytes: number, slotBytes: number): string | null {
  if (diskFileBytes(DISK_SLOTS_MAX + 1, slotBytes) > fileBytes) return null;
  const used = readableBytes(diskFileBytes(DISK_SLOTS_MAX, slotBytes));
  return (
    `disk tier: ${used} of ${readableBytes(fileBytes)} are used, because it has at most ${DISK_SLOTS_MAX} blocks: ` +
    "a larger --block-tokens makes more of it"
  );
}

/** Offset of the slot's header in the file; those of one group are neighbours. */
export function headerOffset(slot: number, slotBytes: number): number {
  return groupOffset(slot, slotBytes) + (slot % GROUP_SLOTS) * HEADER_BYTES;
}

export function payloadOffset(slot: number, slotBytes: number): number {
  return groupOffset(slot, slotBytes) + GROUP_HEADER_BYTES + (slot % GROUP_SLOTS) * slotBytes;
}

function groupOffset(slot: number, slotBytes: number): number {
  const group = Math.floor(slot / GROUP_SLOTS);
  return HEADER_BYTES + group * (GROUP_HEADER_BYTES + GROUP_SLOTS * slotBytes);
}

/** What a file's first page says about the process that wrote it; only of one that is whole. */
export function readFormerPage(page: Uint8Array): { readonly slotBytes: number; readonly digest: Uint8Array } {
  const view = new DataView(page.buffer, page.byteOffset, HEADER_BYTES);
  return {
    slotBytes: Number(view.getBigUint64(AT.slotBytes, true)),
    digest: page.slice(AT.fingerprint, AT.fingerprint + DIGEST_BYTES),
  };
}

/** Whose file it is; "new": nobody's yet. All but "ours" and "new" are reasons to drop everything in it. */
export type FileOwner = "ours" | "new" | "version" | "fingerprint" | "slot-size" | "corrupt";

/** The file's first page. */
export function encodeFilePage(slotBytes: number, digest: Uint8Array): Uint8Array {
  const page = new Uint8Array(HEADER_BYTES);
  const view = new DataView(page.buffer);
  page.set(MAGIC, AT.magic);
  view.setUint32(AT.version, FORMAT_VERSION, true);
  view.setBigUint64(AT.slotBytes, BigInt(slotBytes), true);
  page.set(digest, AT.fingerprint);
  view.setBigUint64(AT.checksum, checksumOf(page), true);
  return page;
}

export function readFilePage(page: Uint8Array, slotBytes: number, digest: Uint8Array): FileOwner {
  const view = new DataView(page.buffer, page.byteOffset, HEADER_BYTES);
  if (page.every((byte) => byte === 0)) return "new";
  if (!MAGIC.every((byte, i) => page[AT.magic + i] === byte)) return "corrupt";
  if (view.getBigUint64(AT.checksum, true) !== checksumOf(page)) return "corrupt";
  if (view.getUint32(AT.version, true) !== FORMAT_VERSION) return "version";
  if (!digest.every((byte, i) => page[AT.fingerprint + i] === byte)) return "fingerprint";
  return view.getBigUint64(AT.slotBytes, true) === BigInt(slotBytes) ? "ours" : "slot-size";
}

function checksumOf(page: Uint8Array): bigint {
  return Bun.hash.xxHash64(page.subarray(0, AT.checksum));
}
