// The pool's promises: every block is in one place, the order of victims hears of every change, and misuse is caught.

import { describe, expect, test } from "bun:test";
import { AssertionError } from "../../../sidecar/assert.ts";
import { BlockPool } from "../../../sidecar/kvcache/block-pool.ts";
import { type BlockUse, newBlockUse } from "../../../sidecar/kvcache/block-use.ts";
import { VictimOrder } from "../../../sidecar/kvcache/victim-order.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

interface Owner extends BlockUse {
  readonly name: string;
}

let clock = 0;

/** Used later than all before it. */
function owner(name: string): Owner {
  return { name, ...newBlockUse(0), recencyMs: ++clock };
}

function newPool(blockCount: number): BlockPool<Owner> {
  return new BlockPool(blockCount, new VictimOrder<Owner>("lru", 0));
}

describe("BlockPool", () => {
  test("hands out neighbours, and null when every block is in use", () => {
    const pool = newPool(3);
    expect([pool.allocate(), pool.allocate(), pool.allocate(), pool.allocate()]).toEqual([0, 1, 2, null]);
    expect(pool.availableCount).toBe(0);
  });

  test("a released block is evictable when it holds something, else free", () => {
    const pool = newPool(2);
    const [kept, dropped] = [pool.allocate()!, pool.allocate()!];
    const prefix = owner("prefix");
    pool.setOwner(kept, prefix, null);
    expect(pool.victim()).toBe(null);
    pool.release(kept);
    pool.release(dropped);
    expect(pool.victim()).toBe(prefix);
    expect(pool.freeCount).toBe(1);
    expect(pool.availableCount).toBe(2);
    pool.disown(kept);
    expect(pool.owner(kept)).toBe(null);
    expect(pool.freeCount).toBe(2);
    pool.checkInvariants();
  });

  test("a shared block is in use until its last user lets go", () => {
    const pool = newPool(1);
    const block = pool.allocate()!;
    pool.setOwner(block, owner("shared"), null);
    pool.retain(block);
    pool.release(block);
    expect(pool.victim()).toBe(null);
    expect(pool.refCount(block)).toBe(1);
    pool.release(block);
    expect(pool.victim()!.name).toBe("shared");
  });

  test("a block that is disowned in use is free when its last user lets go", () => {
    const pool = newPool(1);
    const block = pool.allocate()!;
    pool.setOwner(block, owner("gone"), null);
    pool.disown(block);
    expect(pool.freeCount).toBe(0);
    pool.release(block);
    expect(pool.freeCount).toBe(1);
    pool.checkInvariants();
  });

  test("claims the very blocks that something was found in", () => {
    const pool = newPool(4);
    pool.claim(new Set([1, 3]));
    expect([pool.allocate(), pool.allocate(), pool.allocate()]).toEqual([0, 2, null]);
    expect(() => pool.claim(new Set([1]))).toThrow("not free");
  });

  test("refuses a second release, a retain of a free block, an owner of a free one, a second owner", () => {
    const pool = newPool(2);
    const block = pool.allocate()!;
    pool.release(block);
    expect(() => pool.release(block)).toThrow("released twice");
    expect(() => pool.setOwner(block, owner("late"), null)).toThrow("not in use");
    expect(() => pool.retain(block)).toThrow("cannot be retained");
    expect(() => pool.disown(block)).toThrow(AssertionError);
    const other = newPool(1);
    other.setOwner(other.allocate()!, owner("first"), null);
    expect(() => other.setOwner(0, owner("second"), null)).toThrow("has an owner");
  });

  const seed = testSeed();
  test(`every block stays in exactly one place (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    const pool = newPool(12);
    const held: number[] = [];
    for (let i = 0; i < 3000; i++) {
      const pick = random.next();
      const some = held[random.integer(0, Math.max(0, held.length - 1))];
      if (pick < 0.4) {
        const freeBefore = pool.freeCount;
        const block = pool.allocate();
        expect(block === null).toBe(freeBefore === 0);
        if (block !== null) held.push(block);
      } else if (pick < 0.5 && some !== undefined) {
        if (pool.owner(some) === null) pool.setOwner(some, owner(`${i}`), null);
        else if (random.next() < 0.3) pool.disown(some);
      } else if (pick < 0.6) {
        const victim = pool.victim();
        const block = Array.from({ length: 12 }, (_, at) => at).find((at) => pool.owner(at) === victim);
        if (victim !== null && random.next() < 0.5) pool.disown(block!);
        else if (victim !== null) {
          pool.retain(block!);
          held.push(block!);
        }
      } else if (held.length > 0) {
        pool.release(held.splice(random.integer(0, held.length - 1), 1)[0]!);
      }
      expect(pool.availableCount).toBe(12 - new Set(held).size);
      pool.checkInvariants();
    }
  });
});
