// Ids depend on everything before and on nothing after.

import { describe, expect, test } from "bun:test";
import { BlockChain } from "../../../sidecar/kvcache/block-chain.ts";
import { type BlockId, rootId, sha256Hasher } from "../../../sidecar/kvcache/block-hash.ts";

function chain(salt = 1, fingerprint = "model"): BlockChain {
  return new BlockChain(rootId(sha256Hasher, new Uint8Array(32).fill(salt), fingerprint), 4, sha256Hasher);
}

const TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9];

describe("BlockChain", () => {
  test("the same tokens have the same ids, however they are held and in whatever order one asks", () => {
    const forward = chain();
    const ids = [forward.id(0, TOKENS), forward.id(1, TOKENS)];
    const backward = chain();
    expect(backward.id(1, Int32Array.from(TOKENS))).toBe(ids[1]!);
    expect(backward.id(0, TOKENS)).toBe(ids[0]!);
  });

  test("an id changes with the salt, the fingerprint, any token before, and not with tokens after", () => {
    const id = chain().id(1, TOKENS);
    expect(chain(2).id(1, TOKENS)).not.toBe(id);
    expect(chain(1, "other").id(1, TOKENS)).not.toBe(id);
    expect(chain().id(1, [0, 2, 3, 4, 5, 6, 7, 8])).not.toBe(id);
    expect(chain().id(1, [1, 2, 3, 4, 5, 6, 7, 8, 99])).toBe(id);
  });

  test("equal blocks at different places have different ids", () => {
    const repeated = [1, 2, 3, 4, 1, 2, 3, 4];
    expect(chain().id(0, repeated)).not.toBe(chain().id(1, repeated));
  });

  test("the parent of a block is the block before, of the first the root", () => {
    const ids = chain();
    expect(ids.parent(0, TOKENS)).toBe(ids.root);
    expect(ids.parent(1, TOKENS)).toBe(ids.id(0, TOKENS));
  });

  test("an open block's id names its tokens so far", () => {
    const ids = chain();
    const open = new Set<BlockId>([5, 6, 7, 8].map((end) => ids.openId(1, TOKENS, end)));
    expect(open.size).toBe(4);
    expect(ids.openId(1, TOKENS, 8)).toBe(ids.id(1, TOKENS));
  });

  test("a fork knows what its origin knew and then goes its own way", () => {
    const origin = chain();
    origin.id(0, TOKENS);
    const fork = origin.fork();
    const other = [1, 2, 3, 4, 9, 9, 9, 9];
    expect(fork.id(0, other)).toBe(origin.id(0, TOKENS));
    expect(fork.id(1, other)).toBe(chain().id(1, other));
    expect(origin.id(1, TOKENS)).toBe(chain().id(1, TOKENS));
  });
});
