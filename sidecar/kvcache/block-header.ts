// The 4 KiB that stand beside each block on disk and in the shared host arena: what the block means and how to tell
// that its bytes are whole. The headers are the only index there is; after a restart they are believed only if their
// own checksum, format, fingerprint and, on use, the payload's checksum agree.

import { assert } from "../assert.ts";
import type { BlockId } from "./block-hash.ts";

export const HEADER_BYTES = 4096;
/** Raised whenever the meaning of a header or the layout of a block changes; older ones are dropped. */
export const FORMAT_VERSION = 2;
export const HEADER_TOKENS_MAX = 256;

/** All numbers little-endian. */
const AT = {
  magic: 0, // 8 bytes
  version: 8, // u32
  tokenCount: 12, // u32
  fingerprint: 16, // 32 bytes, SHA-256 of the fingerprint text
  id: 48, // 16 bytes
  parentId: 64, // 16 bytes
  generation: 80, // f64: rises with every write of the file
  payloadChecksum: 88, // u64
  lastUsedAtMs: 96, // f64, Unix
  expiresAtMs: 104, // f64, Unix
  prefixCheck: 112, // u64
  depth: 120, // u32: full blocks before it
  tokens: 128, // i32[HEADER_TOKENS_MAX]
  headerChecksum: HEADER_BYTES - 8, // u64 over everything before it
} as const;

const MAGIC = new TextEncoder().encode("KVSBLOCK");
const ID_BYTES = 16;
const EMPTY = new Uint8Array(HEADER_BYTES);

export interface BlockHeader {
  readonly id: BlockId;
  readonly parentId: BlockId;
  /** See BlockName. */
  readonly prefixCheck: bigint;
  /** Index of the block in its conversation. */
  readonly depth: number;
  readonly tokens: Int32Array;
  readonly generation: number;
  readonly payloadChecksum: bigint;
  readonly lastUsedAtMs: number;
  readonly expiresAtMs: number;
}

/** Why a header is not believed. "empty" is no fault. */
export type HeaderFault = "empty" | "version" | "fingerprint" | "corrupt";

/** 32 bytes that stand for a fingerprint of any length. */
export function fingerprintDigest(fingerprint: string): Uint8Array {
  return new Bun.CryptoHasher("sha256").update(fingerprint).digest();
}

/** Digest of the fingerprint under which a header was written. */
export function headerDigest(bytes: Uint8Array): Uint8Array {
  return bytes.slice(AT.fingerprint, AT.id);
}

/** Writes all HEADER_BYTES of `into`. */
export function encodeHeader(into: Uint8Array, digest: Uint8Array, header: BlockHeader): void {
  const tokenCount = header.tokens.length;
  assert(tokenCount > 0 && tokenCount <= HEADER_TOKENS_MAX, `a block of ${tokenCount} tokens has no header`);
  const view = new DataView(into.buffer, into.byteOffset, HEADER_BYTES);
  into.fill(0, 0, HEADER_BYTES);
  into.set(MAGIC, AT.magic);
  view.setUint32(AT.version, FORMAT_VERSION, true);
  view.setUint32(AT.tokenCount, tokenCount, true);
  into.set(digest, AT.fingerprint);
  writeLatin1(into, AT.id, header.id);
  writeLatin1(into, AT.parentId, header.parentId);
  view.setFloat64(AT.generation, header.generation, true);
  view.setBigUint64(AT.payloadChecksum, header.payloadChecksum, true);
  view.setFloat64(AT.lastUsedAtMs, header.lastUsedAtMs, true);
  view.setFloat64(AT.expiresAtMs, header.expiresAtMs, true);
  view.setBigUint64(AT.prefixCheck, header.prefixCheck, true);
  view.setUint32(AT.depth, header.depth, true);
  header.tokens.forEach((token, i) => view.setInt32(AT.tokens + i * 4, token, true));
  view.setBigUint64(AT.headerChecksum, checksumOf(into), true);
}

/** An unused slot is all zeros, as a fresh file is. */
export function encodeEmptyHeader(into: Uint8Array): void {
  into.fill(0, 0, HEADER_BYTES);
}

export function decodeHeader(bytes: Uint8Array, digest: Uint8Array): BlockHeader | HeaderFault {
  const view = new DataView(bytes.buffer, bytes.byteOffset, HEADER_BYTES);
  if (view.getBigUint64(AT.magic, true) === 0n) return isAllZero(bytes) ? "empty" : "corrupt";
  if (!holds(bytes, AT.magic, MAGIC)) return "corrupt";
  if (view.getBigUint64(AT.headerChecksum, true) !== checksumOf(bytes)) return "corrupt";
  if (view.getUint32(AT.version, true) !== FORMAT_VERSION) return "version";
  if (!holds(bytes, AT.fingerprint, digest)) return "fingerprint";
  const tokenCount = view.getUint32(AT.tokenCount, true);
  if (tokenCount === 0 || tokenCount > HEADER_TOKENS_MAX) return "corrupt";
  const tokens = new Int32Array(tokenCount);
  for (let i = 0; i < tokenCount; i++) tokens[i] = view.getInt32(AT.tokens + i * 4, true);
  return {
    id: readLatin1(bytes, AT.id) as BlockId,
    parentId: readLatin1(bytes, AT.parentId) as BlockId,
    prefixCheck: view.getBigUint64(AT.prefixCheck, true),
    depth: view.getUint32(AT.depth, true),
    tokens,
    generation: view.getFloat64(AT.generation, true),
    payloadChecksum: view.getBigUint64(AT.payloadChecksum, true),
    lastUsedAtMs: view.getFloat64(AT.lastUsedAtMs, true),
    expiresAtMs: view.getFloat64(AT.expiresAtMs, true),
  };
}

/** A plain loop: a start decodes up to a million headers. */
function holds(bytes: Uint8Array, at: number, expected: Uint8Array): boolean {
  for (let i = 0; i < expected.length; i++) if (bytes[at + i] !== expected[i]) return false;
  return true;
}

function checksumOf(bytes: Uint8Array): bigint {
  return Bun.hash.xxHash64(bytes.subarray(0, AT.headerChecksum));
}

function isAllZero(bytes: Uint8Array): boolean {
  return Buffer.compare(bytes.subarray(0, HEADER_BYTES), EMPTY) === 0;
}

function writeLatin1(into: Uint8Array, at: number, id: string): void {
  assert(id.length === ID_BYTES, `a block id has ${ID_BYTES} bytes, not ${id.length}`);
  for (let i = 0; i < ID_BYTES; i++) into[at + i] = id.charCodeAt(i);
}

function readLatin1(bytes: Uint8Array, at: number): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset + at, ID_BYTES).toString("latin1");
}
