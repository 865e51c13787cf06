// Why blocks are not cached any more: each reason is counted, the latest are known by name, and so are all that another
// fingerprint left.

import { describe, expect, test } from "bun:test";
import type { BlockId } from "../../../sidecar/kvcache/block-hash.ts";
import { LostBlocks } from "../../../sidecar/kvcache/lost-blocks.ts";

const id = (number: number) => String(number).padStart(16, "#") as BlockId;
const ids = (count: number) => Array.from({ length: count }, (_, i) => id(i));

describe("LostBlocks", () => {
  test("knows the latest reasons by name, and counts all", () => {
    const lost = new LostBlocks(2);
    lost.note(id(1), "evicted");
    lost.note(id(2), "evicted");
    lost.note(id(1), "expired");
    lost.note(id(3), "io");
    expect([1, 2, 3].map((number) => lost.reason(id(number)))).toEqual(["expired", "absent", "io"]);
    expect(Object.fromEntries(lost.counts)).toEqual({ evicted: 2, expired: 1, io: 1 });
    lost.found(id(1));
    expect(lost.reason(id(1))).toBe("absent");
  });

  test("knows all blocks of one other fingerprint, each once, however many", () => {
    const lost = new LostBlocks(2);
    const digest = new Uint8Array(32).fill(1);
    expect(lost.formerDigest).toBe(null);
    lost.noteFormer({ digest, ids: ids(1000) });
    lost.noteFormer({ digest: digest.slice(), ids: ids(1001) });
    expect(lost.formerDigest).toEqual(digest);
    expect(lost.isFormer(id(0)) && lost.isFormer(id(1000))).toBe(true);
    expect(lost.isFormer(id(1001))).toBe(false);
    expect(lost.counts.get("fingerprint")).toBe(1001);
    expect(lost.reason(id(0))).toBe("absent"); // an id of this process's own
  });

  test("counts those of a second one", () => {
    const lost = new LostBlocks(2);
    lost.noteFormer({ digest: new Uint8Array(32).fill(1), ids: ids(3) });
    lost.noteFormer({ digest: new Uint8Array(32).fill(2), ids: ids(5) });
    expect(lost.counts.get("fingerprint")).toBe(8);
    expect(lost.isFormer(id(4))).toBe(false);
  });
});
