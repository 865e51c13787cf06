// Who holds what, so that a delete takes all that is one conversation's and nothing that is another's.

import { afterEach, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { conversationKey, Holdings } from "../../sidecar/holdings.ts";
import { SeededRandom, testSeed } from "../support/seeded-random.ts";

const SALT = new Uint8Array(32).fill(7);
const [A, B, C] = ["a", "b", "c"].map((id) => conversationKey(SALT, id)) as [Uint8Array, Uint8Array, Uint8Array];
const cleanups: (() => void)[] = [];

afterEach(() => {
  for (const cleanup of cleanups.splice(0).toReversed()) cleanup();
});

function open(path = ":memory:", maxItems = 1000): Holdings {
  const holdings = new Holdings({ path, maxItems });
  cleanups.push(() => holdings.close());
  return holdings;
}

/** 16 characters with all kinds of bytes. */
const block = (n: number) => Buffer.from([n, 0, 255, 128, ...Array(12).fill(n)]).toString("latin1");
const segment = (n: number) => new Uint8Array(32).fill(n);
/** Each for itself. */
const blocks = (...numbers: number[]) => ({ chains: numbers.map((n) => [block(n)]), segments: [] });

describe("Holdings", () => {
  test("a conversation holds alone what no other holds", () => {
    const holdings = open();
    holdings.record(A, { chains: [[block(1), block(2), block(3)]], segments: [segment(1), segment(2)] });
    holdings.record(B, { chains: [[block(1), block(2), block(4)]], segments: [segment(1)] });
    holdings.record(A, { chains: [[block(1), block(5)]], segments: [] });
    const { blocks, segments, usedAt } = holdings.heldAlone(A);
    expect(blocks.toSorted()).toEqual([block(3), block(5)].toSorted());
    expect(segments.map((each) => each[0])).toEqual([2]);
    expect(holdings.remove(A, usedAt)).toBe(true);
    expect(holdings.heldAlone(B).blocks.toSorted()).toEqual([block(1), block(2), block(4)].toSorted());
    expect(holdings.heldAlone(A)).toEqual({ blocks: [], segments: [], usedAt: -1 });
  });

  test("of a chain only what follows the last held block is new", () => {
    const holdings = open();
    const chain = [1, 2, 3, 4, 5].map(block);
    holdings.record(A, { chains: [chain.slice(0, 3)], segments: [] });
    holdings.record(A, { chains: [chain, [...chain.slice(0, 2), block(9)], []], segments: [] });
    expect(holdings.heldAlone(A).blocks.toSorted()).toEqual([...chain, block(9)].toSorted());
  });

  test("one that nobody knows holds nothing", () => {
    const holdings = open();
    expect(holdings.heldAlone(A)).toEqual({ blocks: [], segments: [], usedAt: -1 });
    expect(holdings.remove(A, -1)).toBe(true);
  });

  test("is not struck out when it has come to hold more meanwhile", () => {
    const holdings = open();
    holdings.record(A, blocks(1));
    const { usedAt } = holdings.heldAlone(A);
    holdings.record(A, blocks(2));
    expect(holdings.remove(A, usedAt)).toBe(false);
    expect(holdings.heldAlone(A).blocks).toEqual([block(1), block(2)]);
  });

  test("the same id of another account is another conversation", () => {
    const holdings = open();
    holdings.record(conversationKey(new Uint8Array(32), "a"), blocks(1));
    expect(holdings.heldAlone(A).blocks).toEqual([]);
  });

  test("survives in a file for its owner alone, and knows its order of use", () => {
    const directory = mkdtempSync(join(tmpdir(), "kvasir-holdings-"));
    cleanups.push(() => rmSync(directory, { recursive: true }));
    const path = join(directory, "holdings.sqlite");
    const first = new Holdings({ path, maxItems: 3 });
    first.record(A, blocks(1));
    first.record(B, blocks(2, 3));
    first.record(A, blocks(4));
    for (const file of ["", "-wal", "-shm"]) expect(statSync(path + file).mode & 0o077).toBe(0);
    first.close();
    const second = open(path, 3);
    expect(second.heldAlone(A).blocks).toEqual([block(1), block(4)]);
    expect(second.isFull).toBe(true);
    expect(second.leastRecentlyUsed()).toEqual(B);
    second.record(B, blocks(2));
    expect(second.leastRecentlyUsed()).toEqual(A);
    second.remove(A, second.heldAlone(A).usedAt);
    expect(second.isFull).toBe(false);
  });

  const seed = testSeed();
  test(`agrees with a model that remembers everything (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    const holdings = open(":memory:", 40);
    const model = new Map<Uint8Array, Set<number>>();
    for (let step = 0; step < 2000; step++) {
      const conversation = [A, B, C][random.integer(0, 2)]!;
      const held = model.get(conversation) ?? new Set();
      if (random.next() < 0.8) {
        const numbers = Array.from({ length: random.integer(1, 8) }, () => random.integer(0, 30));
        holdings.record(conversation, blocks(...numbers));
        for (const number of numbers) held.add(number);
        model.set(conversation, held);
      } else {
        model.delete(conversation);
        const others = [...model.values()].reduce((all, numbers) => all.union(numbers), new Set<number>());
        const alone = [...held.difference(others)].map(block);
        const found = holdings.heldAlone(conversation);
        expect(found.blocks.toSorted()).toEqual(alone.toSorted());
        holdings.remove(conversation, found.usedAt);
      }
      const count = [...model.values()].reduce((sum, { size }) => sum + size, 0);
      expect(holdings.isFull).toBe(count > 40);
    }
  });
});
