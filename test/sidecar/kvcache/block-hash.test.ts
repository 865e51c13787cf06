// The hash of blocks: SHA-256 over each part's length and bytes, as another implementation computes it.

import { createHash } from "node:crypto";
import { describe, expect, test } from "bun:test";
import { sha256Hasher } from "../../../sidecar/kvcache/block-hash.ts";

function expected(parts: readonly (string | Uint8Array)[]): string {
  const hash = createHash("sha256");
  for (const part of parts) {
    const length = new Uint8Array(4);
    new DataView(length.buffer).setUint32(0, part.length, true);
    hash.update(length);
    hash.update(typeof part === "string" ? Buffer.from(part, "latin1") : part);
  }
  return hash.digest().subarray(0, 16).toString("latin1");
}

describe("sha256Hasher", () => {
  const bytes = (length: number) => Uint8Array.from({ length }, (_, i) => (i * 31) % 256);
  const cases: Record<string, readonly (string | Uint8Array)[]> = {
    "nothing": [],
    "an empty part": ["", bytes(3)],
    "an id of all bytes": [String.fromCharCode(...bytes(256)), bytes(256)],
    "more than was ever gathered, behind other parts": ["before", bytes(5000), bytes(40_000)],
    "little behind much": ["after", bytes(8)],
  };
  for (const [name, parts] of Object.entries(cases)) {
    test(name, () => expect<string>(sha256Hasher(parts)).toBe(expected(parts)));
  }

  test("where a part ends matters", () => {
    expect(sha256Hasher(["ab", "c"])).not.toBe(sha256Hasher(["a", "bc"]));
  });
});
