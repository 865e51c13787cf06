// Ids depend on everything before and on nothing after.

import { describe, expect, test } from "bun:test";
import { BlockChain } from "../../../sidecar/kvcache/block-chain.ts";
import { type BlockId, rootId, sha256Hasher } from "../../../sidecar/kvcache/block-hash.ts";
import { fingerprintDigest } from "../../../sidecar/kvcache/block-header.ts";
import { TruncationRule } from "../../../sidecar/kvcache/view.ts";

/** Windows of 6 blocks; at each drop 3 of them leave, the first block stays. */
const RULE = new TruncationRule({ blockTokens: 4, maxTokens: 25, keepBlocks: 1, ratio: 0.5 });

function chain(salt = 1, fingerprint = "model"): BlockChain {
  const root = rootId(sha256Hasher, new Uint8Array(32).fill(salt), fingerprintDigest(fingerprint));
  return new BlockChain(root, RULE, sha256Hasher);
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
    expect(ids.parent(0, TOKENS).parentId).toBe(ids.root);
    expect(ids.parent(1, TOKENS).parentId).toBe(ids.id(0, TOKENS));
  });

  test("an open block's id names its tokens so far", () => {
    const ids = chain();
    const open = new Set<BlockId>([5, 6, 7, 8].map((end) => ids.openName(1, TOKENS, end).id));
    expect(open.size).toBe(4);
    expect(ids.openName(1, TOKENS, 8).id).toBe(ids.id(1, TOKENS));
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

  const LONG = Array.from({ length: 64 }, (_, i) => i % 7);

  test("a block computed after a drop is another one than without it", () => {
    const wide = new TruncationRule({ blockTokens: 4, maxTokens: 100, keepBlocks: 1, ratio: 0.5 });
    const endless = new BlockChain(chain().root, wide, sha256Hasher);
    const short = chain();
    for (let index = 0; index < 6; index++) expect(short.id(index, LONG)).toBe(endless.id(index, LONG));
    for (let index = 6; index < 16; index++) expect(short.id(index, LONG)).not.toBe(endless.id(index, LONG));
    // The parent's id is the same for both, the witness is not: their children are never mixed.
    const [one, other] = [short.name(6, LONG), endless.name(6, LONG)];
    expect(one.parentId).toBe(other.parentId);
    expect(one.prefixCheck).not.toBe(other.prefixCheck);
  });

  test("what is computed afresh from a later view has names of its own behind the kept prefix", () => {
    const whole = chain();
    const restarted = whole.restartAt(2);
    expect(restarted.id(0, LONG)).toBe(whole.id(0, LONG));
    expect(restarted.parent(7, LONG).parentId).toBe(whole.id(0, LONG));
    expect(restarted.id(7, LONG)).not.toBe(whole.id(7, LONG));
    expect([...restarted.ids(LONG, 40)]).toHaveLength(1 + 3);
    expect(whole.restartAt(1).id(7, LONG)).not.toBe(restarted.id(7, LONG));
  });
});
