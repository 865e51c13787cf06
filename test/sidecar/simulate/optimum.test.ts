// The offline optimum against every possible choice on small cases.

import { describe, expect, test } from "bun:test";
import { Conversation, type SimulatedBlock } from "../../../sidecar/simulate/conversation.ts";
import { AccessLog } from "../../../sidecar/simulate/optimum.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

function blocksOf(count: number): SimulatedBlock[] {
  const conversation = new Conversation(8);
  conversation.append(8 * count);
  return conversation.blocks;
}

describe("optimum", () => {
  test("keeps the conversation that returns first", () => {
    const log = new AccessLog(2);
    const [a, b] = [blocksOf(2), blocksOf(2)];
    log.start(0, []);
    log.start(1, []);
    log.finish(0, a);
    log.finish(1, b);
    log.start(1, b);
    log.start(0, a);
    expect(log.optimum(0)).toEqual({ hitBlocks: 2, hitTokens: 16, hitTurns: 1 });
  });

  test("keeps the prefix when only a part fits", () => {
    const log = new AccessLog(1);
    const [first, second] = blocksOf(2);
    second!.tokenCount = 3;
    log.finish(0, [first!, second!]);
    log.start(0, [first!, second!]);
    expect(log.optimum(0)).toEqual({ hitBlocks: 1, hitTokens: 8, hitTurns: 0 });
  });

  test("does not store what no later turn wants, and does not count the warm-up", () => {
    const log = new AccessLog(1);
    const [a, b] = [blocksOf(1), blocksOf(1)];
    log.finish(0, a);
    log.finish(1, b);
    log.start(1, b);
    log.start(0, []);
    expect(log.optimum(0).hitBlocks).toBe(1);
    expect(log.optimum(1).hitBlocks).toBe(0);
  });

  const seed = testSeed();
  test(`equals the best of all choices on random cases (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    for (let round = 0; round < 200; round++) {
      const events = randomEvents(random);
      const capacity = random.integer(1, 4);
      expect(optimumOf(events, capacity)).toBe(bestOfAll(events, capacity));
    }
  });
});

/** Sessions of one block each, in service from a start to its finish: [kind, session]. */
type Event = readonly ["start" | "finish", number];

function randomEvents(random: SeededRandom): Event[] {
  const inService = new Set<number>();
  return Array.from({ length: 16 }, () => {
    const session = random.integer(0, 5);
    if (inService.delete(session)) return ["finish", session] as const;
    inService.add(session);
    return ["start", session] as const;
  });
}

function optimumOf(events: readonly Event[], capacity: number): number {
  const log = new AccessLog(capacity);
  const blocks = Array.from({ length: 6 }, () => blocksOf(1));
  const seen = new Set<number>();
  for (const [kind, session] of events) {
    if (kind === "finish") log.finish(session, blocks[session]!);
    else log.start(session, seen.has(session) ? blocks[session]! : []);
    seen.add(session);
  }
  return log.optimum(0).hitBlocks;
}

/** Tries every set of kept intervals, from a finish to the next start of its session. */
function bestOfAll(events: readonly Event[], capacity: number): number {
  const intervals = events.flatMap(([kind, session], begin) => {
    if (kind === "start") return [];
    const end = events.findIndex(([other, who], i) => i > begin && other === "start" && who === session);
    return end < 0 ? [] : [{ begin, end }];
  });
  let best = 0;
  for (let choice = 0; choice < 2 ** intervals.length; choice++) {
    const kept = intervals.filter((_, i) => (choice >> i) & 1);
    const fits = events.every(
      (_, at) => kept.filter(({ begin, end }) => begin <= at && at < end).length <= capacity,
    );
    if (fits) best = Math.max(best, kept.length);
  }
  return best;
}
