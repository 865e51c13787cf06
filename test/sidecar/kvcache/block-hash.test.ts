// The hash of blocks: SHA-256 over each part's length and bytes, as another implementation computes it.

import { createHash } from "node:crypto";
import { describe, expect, test } from "bun:test";
import { sha256Hasher } from "../../../sidecar/kvcache/block-hash.ts";

type Part = string | Uint8Array | Int32Array;

function expected(parts: readonly Part[]): string {
  const hash = createHash("sha256");
  for (const part of parts) {
    const bytes = typeof part === "string" ? Buffer.from(part, "latin1")
      : Buffer.from(part.buffer, part.byteOffset, part.byteLength);
    const length = new Uint8Array(4);
    new DataView(length.buffer).setUint32(0, bytes.length, true);
    hash.update(length);
    hash.update(bytes);
  }
  return hash.digest().subarray(0, 16).toString("latin1");
}

describe("sha256Hasher", () => {
  const bytes = (length: number) => Uint8Array.from({ length }, (_, i) => (i * 31) % 256);
  const tokens = Int32Array.from({ length: 3000 }, (_, i) => i * 65_537);
  const cases: Record<string, readonly Part[]> = {
    "nothing": [],
    "an empty part": ["", bytes(3)],
    "an id of all bytes": [String.fromCharCode(...bytes(256)), bytes(256)],
    "more than was ever gathered, behind other parts": ["before", bytes(5000), bytes(40_000)],
    "little behind much": ["after", bytes(8)],
    "tokens at a word's beginning": ["an id of 16 char", tokens.subarray(5, 69)],
    "tokens anywhere else": ["odd", tokens.subarray(5, 69), tokens.subarray(7, 8)],
    "more tokens than ever before": ["an id of 16 char", tokens],
  };
  for (const [name, parts] of Object.entries(cases)) {
    test(name, () => expect<string>(sha256Hasher(parts)).toBe(expected(parts)));
  }

  test("where a part ends matters", () => {
    expect(sha256Hasher(["ab", "c"])).not.toBe(sha256Hasher(["a", "bc"]));
  });
});
