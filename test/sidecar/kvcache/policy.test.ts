// The cache policy against hand-made cases, and against a model that recomputes everything from scratch.

import { describe, expect, test } from "bun:test";
import {
  type BlockUse,
  blocksToDemote,
  CachePolicy,
  evictionBudget,
  newBlockUse,
  paperWindow,
  type PolicyName,
  prefetchBudget,
} from "../../../sidecar/kvcache/policy.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

interface Block extends BlockUse {
  readonly name: string;
}

function newBlock(name: string, depth: number): Block {
  return { name: `${name}${depth}`, ...newBlockUse(depth) };
}

function chain(name: string, length: number, startDepth = 0): Block[] {
  return Array.from({ length }, (_, i) => newBlock(name, startDepth + i));
}

/** Blocks in host memory, used at `nowMs`, evictable. */
function cached(policy: CachePolicy<Block>, name: string, length: number, nowMs: number): Block[] {
  const blocks = chain(name, length);
  blocks.forEach((block, i) => policy.host.insert(block, blocks[i - 1] ?? null));
  policy.touch(blocks, nowMs);
  for (const block of blocks) policy.host.release(block);
  return blocks;
}

function evictAll(policy: CachePolicy<Block>): string {
  const names: string[] = [];
  for (let block = policy.host.next(); block !== null; block = policy.host.next()) {
    names.push(block.name);
    policy.host.remove(block);
    policy.forget(block);
  }
  return names.join(" ");
}

function newPolicy(policy: PolicyName, windowBlocks = 100): CachePolicy<Block> {
  return new CachePolicy<Block>({ policy, windowBlocks });
}

describe("victims", () => {
  test("lru: the least recently used conversation goes first, its last block before its first", () => {
    const policy = newPolicy("lru");
    const a = cached(policy, "a", 2, 1);
    cached(policy, "b", 2, 2);
    policy.touch(a, 3);
    expect(evictAll(policy)).toBe("b1 b0 a1 a0");
  });

  test("fifo: use does not matter, and a conversation is as old as its first block", () => {
    const policy = newPolicy("fifo");
    const a = cached(policy, "a", 1, 1);
    cached(policy, "b", 2, 2);
    const [a1] = chain("a", 1, 1);
    policy.host.insert(a1!, a[0]!);
    policy.touch([a[0]!, a1!], 3);
    policy.host.release(a1!);
    expect(evictAll(policy)).toBe("a1 a0 b1 b0");
  });

  test("scheduler-aware: outside the window by recency, inside the furthest sequence first", () => {
    const policy = newPolicy("scheduler-aware");
    const a = cached(policy, "a", 2, 1);
    const b = cached(policy, "b", 2, 2);
    cached(policy, "c", 2, 3);
    cached(policy, "d", 1, 4);
    policy.enqueue(a);
    policy.enqueue(b);
    expect(evictAll(policy)).toBe("c1 c0 d0 b1 b0 a1 a0");
  });

  test("the same queue leaves lru unmoved: it evicts the head of the queue", () => {
    const policy = newPolicy("lru");
    const a = cached(policy, "a", 1, 1);
    cached(policy, "b", 1, 2);
    policy.enqueue(a);
    expect(policy.host.next()).toBe(a[0]!);
  });

  test("a pinned block is never a victim", () => {
    for (const name of ["scheduler-aware", "lru", "fifo"] as const) {
      const policy = newPolicy(name);
      const a = cached(policy, "a", 1, 1);
      const b = cached(policy, "b", 1, 2);
      policy.host.retain(a[0]!);
      expect(policy.host.next()).toBe(b[0]!);
      policy.host.retain(b[0]!);
      expect(policy.host.next()).toBeNull();
      policy.host.release(a[0]!);
      expect(policy.host.next()).toBe(a[0]!);
      expect(policy.host.pinnedCount).toBe(1);
    }
  });

  test("priority is worth recency, not immunity", () => {
    const policy = new CachePolicy<Block>({ policy: "lru", windowBlocks: 0, priorityBonusMs: 100 });
    const a = cached(policy, "a", 1, 0);
    policy.touch(a, 1, { priority: 1 });
    cached(policy, "b", 1, 50);
    cached(policy, "c", 1, 200);
    expect(evictAll(policy)).toBe("b0 a0 c0");
  });

  test("tiers are ordered apart: a block may be pinned in one and a victim in the other", () => {
    const policy = newPolicy("lru");
    const [a] = cached(policy, "a", 1, 1);
    policy.disk.insert(a!, null);
    policy.host.retain(a!);
    policy.disk.release(a!);
    expect(policy.host.next()).toBeNull();
    expect(policy.disk.next()).toBe(a!);
  });
});

describe("the look-ahead window", () => {
  test("ends in the middle of a sequence when its budget does", () => {
    const policy = newPolicy("scheduler-aware", 3);
    const a = cached(policy, "a", 2, 1);
    const b = cached(policy, "b", 3, 2);
    policy.enqueue(a);
    policy.enqueue(b);
    expect(policy.windowCount).toBe(3);
    expect(b.map((block) => Number.isFinite(block.neededAt))).toEqual([true, false, false]);
    expect(evictAll(policy)).toBe("b2 b1 b0 a1 a0");
  });

  test("counts a shared block once, for the sequence that runs first", () => {
    const policy = newPolicy("scheduler-aware", 4);
    const prefix = cached(policy, "p", 2, 1);
    const a = [...prefix, ...chain("a", 1, 2)];
    const b = [...prefix, ...chain("b", 1, 2)];
    const first = policy.enqueue(a);
    const second = policy.enqueue(b);
    expect(policy.windowCount).toBe(4);
    expect(prefix[0]!.neededAt).toBe(first.ticket);
    policy.dequeue(first);
    expect(prefix[0]!.neededAt).toBe(second.ticket);
    expect(policy.windowCount).toBe(3);
    policy.dequeue(second);
    expect(policy.windowCount).toBe(0);
  });

  test("moves on when the head of the queue runs, and back when a preempted sequence returns", () => {
    const policy = newPolicy("scheduler-aware", 2);
    const a = cached(policy, "a", 2, 1);
    const b = cached(policy, "b", 2, 2);
    const head = policy.enqueue(a);
    policy.enqueue(b);
    expect(b[0]!.neededAt).toBe(Infinity);
    policy.dequeue(head);
    expect(b.every((block) => Number.isFinite(block.neededAt))).toBe(true);
    policy.requeue(a);
    expect(b[0]!.neededAt).toBe(Infinity);
    expect(a.every((block) => Number.isFinite(block.neededAt))).toBe(true);
  });

  test("budgets: one window spans host and disk, the other what host memory can offer", () => {
    expect(evictionBudget(10, 100)).toBe(110);
    expect(prefetchBudget(10, 3, 2)).toBe(5);
    expect(prefetchBudget(10, 9, 2)).toBe(0);
    expect(paperWindow(10e9, 3e9)).toBe(3);
    expect(paperWindow(10e9, 0)).toBe(0);
  });
});

describe("prefetch", () => {
  test("lists what is missing, head first, inside the window and at most the limit", () => {
    const policy = newPolicy("scheduler-aware");
    const [a, b, c] = [chain("a", 2), chain("b", 2), chain("c", 2)];
    for (const blocks of [a, b, c]) policy.enqueue(blocks);
    const names = (window: number, limit: number) =>
      policy.prefetch(window, limit, (block) => block.name !== "a1").map((block) => block.name);
    expect(names(5, 10)).toEqual(["a0", "b0", "b1", "c0"]);
    expect(names(5, 2)).toEqual(["a0", "b0"]);
    expect(names(0, 9)).toEqual([]);
  });

  test("is nothing for lru and fifo", () => {
    for (const name of ["lru", "fifo"] as const) {
      const policy = newPolicy(name);
      policy.enqueue(chain("a", 2));
      expect(policy.prefetch(10, 10, () => true)).toEqual([]);
    }
  });
});

describe("idle time", () => {
  test("drops what is idle, keeps what somebody waits for, uses, or shares with a longer life", () => {
    const policy = newPolicy("scheduler-aware");
    const idle = cached(policy, "i", 1, 0);
    const [waitedFor, used, shared] = ["w", "u", "s"].map((name) => {
      const blocks = chain(name, 1);
      policy.host.insert(blocks[0]!, null);
      policy.touch(blocks, 0, { ttlMs: 10 });
      if (name !== "u") policy.host.release(blocks[0]!);
      return blocks;
    });
    const waiter = policy.enqueue(waitedFor!);
    policy.touch(shared!, 0, { ttlMs: 30 });
    expect(policy.expire(10)).toEqual([]);
    policy.dequeue(waiter);
    expect(policy.expire(9)).toEqual([]);
    expect(policy.expire(10)).toEqual(waitedFor!);
    policy.host.release(used![0]!);
    expect(policy.expire(29)).toEqual(used!);
    expect(policy.expire(30)).toEqual(shared!);
    expect(policy.expire(1e12)).toEqual([]);
    expect(idle[0]!.expiresAtMs).toBe(Infinity);
  });
});

describe("demotion", () => {
  test("starts below the low watermark and goes up to the high one, counting what is under way", () => {
    const marks = { lowBlocks: 4, highBlocks: 10 };
    expect(blocksToDemote(4, 0, marks)).toBe(0);
    expect(blocksToDemote(3, 0, marks)).toBe(7);
    expect(blocksToDemote(1, 2, marks)).toBe(7);
    expect(blocksToDemote(0, 9, marks)).toBe(0);
  });
});

// --- against the model ---

/** A queue and blocks by their names; every answer is computed afresh. */
class Model {
  readonly queue: { readonly ticket: number; blocks: Block[] }[] = [];
  readonly recency = new Map<Block, number>();
  readonly evictable = new Set<Block>();

  constructor(readonly windowBlocks: number) {}

  walk(budget: number): Map<Block, number> {
    const inside = new Map<Block, number>();
    for (const { ticket, blocks } of this.queue) {
      for (const block of blocks) {
        if (inside.size < budget && !inside.has(block)) inside.set(block, ticket);
      }
    }
    return inside;
  }

  /** Larger goes first. */
  victimKeys(block: Block, inside: Map<Block, number>): number[] {
    const ticket = inside.get(block);
    if (ticket === undefined) return [Infinity, -this.recency.get(block)!, block.depth];
    return [ticket, 0, block.depth];
  }

  worstKeys(): number[] | null {
    const inside = this.walk(this.windowBlocks);
    let worst: number[] | null = null;
    for (const block of this.evictable) {
      const keys = this.victimKeys(block, inside);
      if (worst === null || isLarger(keys, worst)) worst = keys;
    }
    return worst;
  }
}

function isLarger(a: number[], b: number[]): boolean {
  const at = a.findIndex((value, i) => value !== b[i]);
  return at >= 0 && a[at]! > b[at]!;
}

describe("random operations", () => {
  const seed = testSeed();
  for (const windowBlocks of [0, 7, 25, 1000]) {
    test(`agree with the model, window of ${windowBlocks} blocks (SEED=${seed})`, () => {
      checkAgainstModel(new SeededRandom(seed + windowBlocks), windowBlocks);
    });
  }
});

/** A forest: each conversation continues a prefix shared with others. */
function randomConversations(random: SeededRandom): Block[][] {
  const prefixes = [chain("p", 3), chain("q", 2), []];
  return Array.from({ length: 20 }, (_, i) => {
    const prefix = prefixes[random.integer(0, 2)]!;
    return [...prefix, ...chain(`c${i}.`, random.integer(1, 6), prefix.length)];
  });
}

function checkAgainstModel(random: SeededRandom, windowBlocks: number): void {
  const policy = new CachePolicy<Block>({ policy: "scheduler-aware", windowBlocks });
  const model = new Model(windowBlocks);
  const conversations = randomConversations(random);
  const waiters = new Map<number, ReturnType<typeof policy.enqueue>>();
  const pickConversation = () => conversations[random.integer(0, conversations.length - 1)]!;
  for (let step = 1; step <= 3000; step++) {
    const choice = random.integer(0, 9);
    const blocks = pickConversation().filter(() => choice !== 2 || random.next() < 0.7);
    if (choice <= 2) {
      const waiter = choice === 1 ? policy.requeue(blocks) : policy.enqueue(blocks);
      waiters.set(waiter.ticket, waiter);
      if (choice === 1) model.queue.unshift({ ticket: waiter.ticket, blocks });
      else model.queue.push({ ticket: waiter.ticket, blocks });
    } else if (choice <= 5 && model.queue.length > 0) {
      const at = choice === 3 ? 0 : random.integer(0, model.queue.length - 1);
      const { ticket } = model.queue[at]!;
      if (choice === 5) {
        policy.replace(waiters.get(ticket)!, blocks);
        model.queue[at]!.blocks = blocks;
      } else {
        policy.dequeue(waiters.get(ticket)!);
        model.queue.splice(at, 1);
      }
    } else if (choice <= 7) {
      policy.touch(blocks, step);
      for (const block of blocks) {
        model.recency.set(block, step);
        if (!policy.host.has(block)) policy.host.insert(block, null);
        if (policy.host.isPinned(block)) policy.host.release(block);
        model.evictable.add(block);
      }
    } else if (choice === 8) {
      for (const block of blocks) if (model.evictable.delete(block)) policy.host.retain(block);
    } else {
      evictOne(policy, model);
    }
    expectAgreement(policy, model, random.integer(0, 40));
  }
}

function evictOne(policy: CachePolicy<Block>, model: Model): void {
  const victim = policy.host.next();
  if (victim === null) return;
  policy.host.remove(victim);
  policy.forget(victim);
  model.evictable.delete(victim);
  for (const waiting of model.queue) waiting.blocks = waiting.blocks.filter((block) => block !== victim);
}

function expectAgreement(policy: CachePolicy<Block>, model: Model, prefetchWindow: number): void {
  policy.checkInvariants();
  const inside = model.walk(model.windowBlocks);
  expect(policy.windowCount).toBe(inside.size);
  const victim = policy.host.next();
  const worst = model.worstKeys();
  expect(victim === null ? null : model.victimKeys(victim, inside)).toEqual(worst);
  const prefetched = policy.prefetch(prefetchWindow, Infinity, () => true);
  expect(prefetched).toEqual([...model.walk(prefetchWindow).keys()]);
}

describe("size", () => {
  test("a queue of 2,000 sequences and 100,000 blocks drains with a moving window", () => {
    const policy = new CachePolicy<Block>({ policy: "scheduler-aware", windowBlocks: 5000 });
    const conversations = Array.from({ length: 2000 }, (_, i) => cached(policy, `${i}.`, 50, i));
    const waiters = conversations.map((blocks) => policy.enqueue(blocks));
    expect(policy.windowCount).toBe(5000);
    waiters.forEach((waiter, i) => {
      expect(policy.windowCount).toBe(Math.min(5000, (2000 - i) * 50));
      for (const block of conversations[i]!) policy.host.remove(block);
      policy.dequeue(waiter);
    });
    expect(policy.host.residentCount).toBe(0);
    policy.checkInvariants();
  });
});
