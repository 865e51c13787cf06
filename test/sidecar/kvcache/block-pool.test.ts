// The pool's promises: every block is in one place, and misuse is caught.

import { describe, expect, test } from "bun:test";
import { AssertionError } from "../../../sidecar/assert.ts";
import { BlockPool } from "../../../sidecar/kvcache/block-pool.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

describe("BlockPool", () => {
  test("hands out neighbours, and null when every block is in use", () => {
    const pool = new BlockPool<string>(3);
    expect([pool.allocate(), pool.allocate(), pool.allocate(), pool.allocate()]).toEqual([0, 1, 2, null]);
    expect(pool.availableCount).toBe(0);
  });

  test("a released block is evictable when it holds something, else free", () => {
    const pool = new BlockPool<string>(2);
    const [kept, dropped] = [pool.allocate()!, pool.allocate()!];
    pool.setOwner(kept, "prefix");
    pool.release(kept);
    pool.release(dropped);
    expect([...pool.evictable()]).toEqual([kept]);
    expect(pool.freeCount).toBe(1);
    expect(pool.availableCount).toBe(2);
    expect(pool.evict(kept)).toBe("prefix");
    expect(pool.owner(kept)).toBe(null);
    pool.checkInvariants();
  });

  test("offers the least recently released block first", () => {
    const pool = new BlockPool<string>(3);
    for (let block = 0; block < 3; block++) pool.setOwner(pool.allocate()!, `block ${block}`);
    for (const block of [1, 0, 2]) pool.release(block);
    pool.retain(1);
    pool.release(1);
    expect([...pool.evictable()]).toEqual([0, 2, 1]);
  });

  test("a shared block is in use until its last user lets go", () => {
    const pool = new BlockPool<string>(1);
    const block = pool.allocate()!;
    pool.setOwner(block, "shared");
    pool.retain(block);
    pool.release(block);
    expect([...pool.evictable()]).toEqual([]);
    expect(pool.refCount(block)).toBe(1);
    pool.release(block);
    expect([...pool.evictable()]).toEqual([block]);
  });

  test("refuses a second release, a retain of a free block, an evict of one in use, an owner of a free one", () => {
    const pool = new BlockPool<string>(2);
    const block = pool.allocate()!;
    expect(() => pool.evict(block)).toThrow(AssertionError);
    pool.release(block);
    expect(() => pool.release(block)).toThrow("released twice");
    expect(() => pool.setOwner(block, "late")).toThrow("not in use");
    expect(() => pool.retain(block)).toThrow("cannot be retained");
  });

  const seed = testSeed();
  test(`every block stays in exactly one place (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    const pool = new BlockPool<number>(12);
    const held: number[] = [];
    for (let i = 0; i < 3000; i++) {
      const pick = random.next();
      if (pick < 0.4) {
        const freeBefore = pool.freeCount;
        const block = pool.allocate();
        expect(block === null).toBe(freeBefore === 0);
        if (block !== null) held.push(block);
      } else if (pick < 0.5 && held.length > 0) {
        pool.setOwner(held[random.integer(0, held.length - 1)]!, i);
      } else if (pick < 0.6) {
        const evictable = [...pool.evictable()];
        const block = evictable[random.integer(0, evictable.length - 1)];
        if (block !== undefined && random.next() < 0.5) pool.evict(block);
        else if (block !== undefined) {
          pool.retain(block);
          held.push(block);
        }
      } else if (held.length > 0) {
        pool.release(held.splice(random.integer(0, held.length - 1), 1)[0]!);
      }
      expect(pool.availableCount).toBe(12 - new Set(held).size);
      pool.checkInvariants();
    }
  });
});
