// Finding blocks by id, and the child that shares most tokens.

import { describe, expect, test } from "bun:test";
import type { BlockId } from "../../../sidecar/kvcache/block-hash.ts";
import { type CachedBlock, newCachedBlock } from "../../../sidecar/kvcache/cached-block.ts";
import { PrefixIndex } from "../../../sidecar/kvcache/prefix-index.ts";

const ROOT = "root" as BlockId;

const AT_ROOT = { parentId: ROOT, prefixCheck: 0n };

function block(id: string, tokens: number[], parentId: string = ROOT, prefixCheck = 0n): CachedBlock {
  const name = { id: id as BlockId, parentId: parentId as BlockId, prefixCheck };
  return newCachedBlock(name, Int32Array.from(tokens), 0);
}

function named(id: string) {
  return { id: id as BlockId, ...AT_ROOT };
}

describe("PrefixIndex", () => {
  test("finds a block by id only when its tokens and all before them agree", () => {
    const index = new PrefixIndex();
    const known = block("a", [1, 2, 3]);
    index.insert(known);
    expect(index.find(named("a"), [9, 1, 2, 3], 1, 4)).toBe(known);
    expect(index.find(named("a"), [1, 2, 4], 0, 3)).toBe("collision");
    expect(index.find(named("a"), [1, 2], 0, 2)).toBe("collision");
    expect(index.find({ ...named("a"), prefixCheck: 1n }, [1, 2, 3], 0, 3)).toBe("collision");
    expect(index.find(named("b"), [1, 2, 3], 0, 3)).toBe(null);
  });

  test("the longest child is the one with the longest common run, not the longest block", () => {
    const index = new PrefixIndex();
    const long = block("long", [1, 2, 9, 9, 9]);
    const near = block("near", [1, 2, 3]);
    for (const child of [long, near, block("other", [5])]) index.insert(child);
    expect(index.longestChild(AT_ROOT, [1, 2, 3, 4], 0, 4)).toEqual({ block: near, length: 3 });
    expect(index.longestChild(AT_ROOT, [1, 2, 9, 4], 0, 4)).toEqual({ block: long, length: 3 });
    expect(index.longestChild(AT_ROOT, [1, 2, 3, 4], 0, 1)!.length).toBe(1);
    expect(index.longestChild(AT_ROOT, [7], 0, 1)).toBe(null);
    expect(index.longestChild({ ...AT_ROOT, prefixCheck: 1n }, [1, 2], 0, 2)).toBe(null);
    expect(index.longestChild(AT_ROOT, [1, 2, 3], 0, 3, (child) => child !== near)!.block).toBe(long);
    expect(index.longestChild(AT_ROOT, [1], 0, 0)).toBe(null);
    expect(index.longestChild({ ...AT_ROOT, parentId: "elsewhere" as BlockId }, [1], 0, 1)).toBe(null);
  });

  test("children outlive their parent", () => {
    const index = new PrefixIndex();
    const parent = block("parent", [1]);
    const child = block("child", [2], "parent");
    index.insert(parent);
    index.insert(child);
    index.remove(parent);
    expect([...index.children(parent.id)]).toEqual([child]);
    expect(index.size).toBe(1);
  });

  test("a renamed block is found under its new name only, at the same parent", () => {
    const index = new PrefixIndex();
    const open = block("open", [1, 2]);
    index.insert(open);
    index.rename(open, "full" as BlockId, Int32Array.of(1, 2, 3));
    expect(index.has("open" as BlockId)).toBe(false);
    expect(index.find(named("full"), [1, 2, 3], 0, 3)).toBe(open);
    expect([...index.children(ROOT)]).toEqual([open]);
  });

  test("refuses a second block of one id and the removal of a stranger", () => {
    const index = new PrefixIndex();
    index.insert(block("a", [1]));
    expect(() => index.insert(block("a", [2]))).toThrow("keeps its id");
    expect(() => index.remove(block("a", [1]))).toThrow("not in the index");
  });

  test("keeps nothing of what was removed", () => {
    const index = new PrefixIndex();
    const blocks = Array.from({ length: 20 }, (_, i) => block(`b${i}`, [i], i < 10 ? ROOT : `b${i - 10}`));
    for (const each of blocks) index.insert(each);
    for (const each of blocks) index.remove(each);
    expect(index.size).toBe(0);
    for (const { parentId } of blocks) expect([...index.children(parentId)]).toEqual([]);
  });
});
