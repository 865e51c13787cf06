// The engine on a fake device whose every answer depends on every byte of KV: batching, cutting, preempting,
// aborting and expiring may change when tokens come, never which.

import { describe, expect, test } from "bun:test";
import type { EngineRequest } from "../../../sidecar/engine/request.ts";
import { EngineHarness } from "../../support/engine-harness.ts";
import { FAKE_EOS, FAKE_VOCAB, GREEDY } from "../../support/fake-runner.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const SALT_OTHER = new Uint8Array(32).fill(9);
const endless = { ...GREEDY, ignoreEos: true };

function prompt(length: number, seed = 1): number[] {
  const random = new SeededRandom(seed);
  return Array.from({ length }, () => random.integer(1, FAKE_VOCAB - 1));
}

function expectReference(harness: EngineHarness, id: number, request: EngineRequest, choice = 0): void {
  const sampling = { ...request.sampling, seed: request.sampling.seed + choice };
  const expected = harness.reference({ ...request, sampling });
  const { tokens, finish } = harness.answer(id, choice);
  expect(tokens).toEqual(expected.tokens);
  expect(finish!.reason).toBe(expected.reason);
  const end = expected.reason === "stop" ? [FAKE_EOS] : [];
  expect(Array.from(finish!.tokens)).toEqual([...request.tokens, ...expected.tokens, ...end]);
  expect(finish!.usage.promptTokens).toBe(request.tokens.length);
  expect(finish!.usage.completionTokens).toBe(expected.tokens.length + end.length);
}

describe("Engine", () => {
  test("answers one request as the model alone would", () => {
    const harness = new EngineHarness();
    const tokens = prompt(21);
    const id = harness.submit(tokens, { maxTokens: 30, sampling: endless });
    harness.runToEnd();
    const expected = harness.reference({ tokens: Int32Array.from(tokens), maxTokens: 30, sampling: endless });
    expect(harness.answer(id).tokens).toEqual(expected.tokens);
    expect(harness.answer(id).finish!.reason).toBe("length");
    harness.expectNothingLeft();
  });

  test("cuts a long prompt into steps of at most maxBatchTokens rows", () => {
    const harness = new EngineHarness({ maxBatchTokens: 7 });
    const id = harness.submit(prompt(30), { maxTokens: 1 });
    harness.runToEnd();
    expect(harness.runner.stepRows).toEqual([7, 7, 7, 7, 2]);
    expect(harness.answer(id).finish!.usage.completionTokens).toBe(1);
  });

  test("keeps one step ahead of the device, and never more than its batches", () => {
    const harness = new EngineHarness();
    harness.submit(prompt(3), { maxTokens: 10, sampling: endless });
    harness.step();
    harness.step();
    expect(harness.runner.stepsInFlight).toBe(2);
    harness.step();
    expect(harness.runner.stepsInFlight).toBe(2);
    harness.runToEnd();
    harness.expectNothingLeft();
  });

  test("computes no row for the token after the last one", () => {
    const harness = new EngineHarness();
    harness.submit(prompt(5), { maxTokens: 4, sampling: endless });
    harness.runToEnd();
    expect(harness.runner.stepRows).toEqual([5, 1, 1, 1]);
  });

  test("a prompt seen before is computed from its last token on", () => {
    const harness = new EngineHarness();
    const tokens = prompt(20);
    harness.submit(tokens, { maxTokens: 3, sampling: endless });
    harness.runToEnd();
    const rowsBefore = harness.engine.stats().rowsComputed;
    const again = harness.submit(tokens, { maxTokens: 1 });
    harness.runToEnd();
    expect(harness.answer(again).finish!.usage.cachedTokens).toEqual({ gpu: 19, host: 0, disk: 0 });
    expect(harness.answer(again).finish!.missReasons).toEqual({ absent: 1 });
    expect(harness.engine.stats().rowsComputed - rowsBefore).toBe(1);
  });

  test("the next turn continues inside the answer of the last one", () => {
    const harness = new EngineHarness();
    const first = harness.submit(prompt(11), { maxTokens: 9, sampling: endless });
    harness.runToEnd();
    const conversation = [...harness.answer(first).finish!.tokens, ...prompt(4, 2)];
    const second = harness.submit(conversation, { maxTokens: 5 });
    harness.runToEnd();
    // The last sampled token never went through the model.
    expect(harness.answer(second).finish!.usage.cachedTokens.gpu).toBe(19);
    const expected = harness.reference({ tokens: Int32Array.from(conversation), maxTokens: 5, sampling: GREEDY });
    expect(harness.answer(second).tokens).toEqual(expected.tokens);
  });

  test("two accounts share nothing", () => {
    const harness = new EngineHarness();
    const tokens = prompt(40);
    harness.submit(tokens);
    harness.runToEnd();
    const other = harness.submit(tokens, { salt: SALT_OTHER });
    harness.runToEnd();
    expect(harness.answer(other).finish!.usage.cachedTokens.gpu).toBe(0);
  });

  test("the end token ends the answer and is not part of it", () => {
    const harness = new EngineHarness();
    const answers = Array.from({ length: 60 }, (_, i) => prompt(3 + (i % 9), i));
    const ids = answers.map((tokens) => harness.submit(tokens, { maxTokens: 60 }));
    harness.runToEnd();
    const stopped = ids.filter((id) => harness.answer(id).finish!.reason === "stop");
    expect(stopped.length).toBeGreaterThan(10);
    for (const id of stopped) expect(harness.answer(id).tokens).not.toContain(FAKE_EOS);
    harness.expectNothingLeft();
  });

  test("choices share the prompt's computation and sample with seeds of their own", () => {
    const harness = new EngineHarness({ maxSequences: 8 });
    const tokens = prompt(29);
    const sampling = { ...endless, temperature: 1, seed: 100 };
    const id = harness.submit(tokens, { choiceCount: 4, maxTokens: 6, sampling });
    harness.runToEnd();
    for (let choice = 0; choice < 4; choice++) {
      const ownSampling = { ...sampling, seed: 100 + choice };
      const ids = Int32Array.from(tokens);
      const expected = harness.reference({ tokens: ids, maxTokens: 6, sampling: ownSampling });
      expect(harness.answer(id, choice).tokens).toEqual(expected.tokens);
    }
    // Prompt once, the last prompt token again for each follower, five more rows for each answer.
    expect(harness.engine.stats().rowsComputed).toBe(29 + 3 + 4 * 5);
    harness.expectNothingLeft();
  });

  test("seeds of the largest size stay different between choices", () => {
    const harness = new EngineHarness({ maxSequences: 4 });
    const sampling = { ...endless, temperature: 1, seed: Number.MAX_SAFE_INTEGER };
    const id = harness.submit(prompt(9), { choiceCount: 4, maxTokens: 12, sampling });
    harness.runToEnd();
    const answers = [0, 1, 2, 3].map((choice) => harness.answer(id, choice).tokens.join());
    expect(new Set(answers).size).toBe(4);
  });

  test("refuses what would make the queue longer than it may be", () => {
    const harness = new EngineHarness({ maxWaiting: 3 });
    const ids = Array.from({ length: 5 }, (_, i) => harness.submit(prompt(4, i)));
    const tooMany = harness.submit(prompt(4), { choiceCount: 4 });
    harness.step();
    expect([...harness.fails.keys()]).toEqual([ids[3]!, ids[4]!, tooMany]);
    expect(harness.fails.get(ids[3]!)).toMatchObject({ code: "queue_full", retryAfterS: 1 });
    harness.runToEnd();
    for (const id of ids.slice(0, 3)) expect(harness.answer(id).finish).not.toBe(null);
    harness.expectNothingLeft();
  });

  test("a request whose time is up fails, waiting or running, and gives everything back", () => {
    const harness = new EngineHarness({ maxSequences: 1 });
    const running = harness.submit(prompt(9), { deadlineAtMs: 2000, maxTokens: 100, sampling: endless });
    const waiting = harness.submit(prompt(9, 2), { deadlineAtMs: 2000 });
    const patient = harness.submit(prompt(9, 3), { maxTokens: 2, sampling: endless });
    harness.step();
    harness.step();
    harness.nowMs = 2000;
    harness.step();
    expect(harness.fails.get(running)!.code).toBe("deadline_exceeded");
    expect(harness.fails.get(waiting)!.code).toBe("deadline_exceeded");
    harness.runToEnd();
    expect(harness.answer(patient).finish!.reason).toBe("length");
    harness.expectNothingLeft();
  });

  test("an abort ends one choice or all of them, and what was computed stays cached", () => {
    const harness = new EngineHarness();
    const sampling = { ...endless, temperature: 1 };
    const tokens = prompt(17);
    const id = harness.submit(tokens, { choiceCount: 3, maxTokens: 50, sampling });
    for (let i = 0; i < 12; i++) {
      harness.step();
      harness.runner.finishStep();
    }
    harness.engine.abort(id, 1, "stop");
    harness.step();
    expect(harness.answer(id, 1).finish!.reason).toBe("stop");
    expect(harness.answer(id, 0).finish).toBe(null);
    harness.engine.abort(id, null, "abort");
    harness.engine.abort(id, null, "abort");
    harness.engine.abort(999, null, "abort");
    harness.runToEnd();
    expect(harness.answer(id, 0).finish!.reason).toBe("abort");
    expect(harness.answer(id, 1).finish!.reason).toBe("stop");
    harness.expectNothingLeft();
    const known = harness.answer(id, 2).finish!.tokens;
    const next = harness.submit([...known, 5], { maxTokens: 3 });
    harness.runToEnd();
    expect(harness.answer(next).finish!.usage.cachedTokens.gpu).toBeGreaterThanOrEqual(tokens.length);
    const expected = harness.reference({ tokens: Int32Array.from([...known, 5]), maxTokens: 3, sampling: GREEDY });
    expect(harness.answer(next).tokens).toEqual(expected.tokens);
  });

  test("followers go on when their leader is aborted before the prompt is computed", () => {
    const harness = new EngineHarness({ maxBatchTokens: 4 });
    const tokens = prompt(30);
    const id = harness.submit(tokens, { choiceCount: 3, maxTokens: 4, sampling: endless });
    harness.step();
    harness.engine.abort(id, 0, "abort");
    harness.runToEnd();
    const expected = harness.reference({ tokens: Int32Array.from(tokens), maxTokens: 4, sampling: endless });
    expect(harness.answer(id, 0).finish!.reason).toBe("abort");
    expect(harness.answer(id, 1).tokens).toEqual(expected.tokens);
    expect(harness.answer(id, 2).tokens).toEqual(expected.tokens);
    harness.expectNothingLeft();
  });

  test("logits that are not finite fail the whole request and no other", () => {
    const harness = new EngineHarness();
    const bad = harness.submit(prompt(9), { choiceCount: 3, maxTokens: 20, sampling: endless });
    const good = harness.submit(prompt(12, 2), { maxTokens: 8, sampling: endless });
    harness.step();
    harness.runner.failsNextSample = true;
    harness.runToEnd();
    expect(harness.fails.get(bad)).toMatchObject({ code: "internal", retryAfterS: null });
    const expected = harness.reference({ tokens: Int32Array.from(prompt(12, 2)), maxTokens: 8, sampling: endless });
    expect(harness.answer(good).tokens).toEqual(expected.tokens);
    harness.expectNothingLeft();
  });

  test("a request of many logit biases holds up nobody who has none", () => {
    const harness = new EngineHarness({ maxBiases: 4, maxSequences: 3 });
    const logitBias = Array.from({ length: 3 }, (_, i) => [i, 0] as const);
    const biased = { ...endless, logitBias };
    const ids = [biased, biased, endless].map((sampling, i) =>
      harness.submit(prompt(5, i), { maxTokens: 10, sampling }),
    );
    for (let turn = 0; harness.answer(ids[2]!).finish === null; turn++) {
      expect(turn).toBeLessThan(100);
      harness.step();
      harness.runner.finishStep();
    }
    expect(harness.answer(ids[1]!).finish).toBe(null);
    harness.runToEnd();
    harness.expectNothingLeft();
  });

  test("a preempted sequence comes before those that arrived later", () => {
    const harness = new EngineHarness({ gpuBlocks: 8, maxSequences: 4, maxModelLen: 56 });
    for (const seed of [0, 1]) harness.submit(prompt(24, seed), { maxTokens: 20, sampling: endless });
    harness.step();
    // The two fill the pool; this one fits into what the preemption of the second frees.
    harness.submit(prompt(2, 50), { maxTokens: 1 });
    const finished: number[] = [];
    harness.runToEnd(() => {
      for (const id of [1, 2, 3]) {
        if (harness.answer(id).finish !== null && !finished.includes(id)) finished.push(id);
      }
    });
    expect(harness.engine.stats().preemptions).toBe(1);
    expect(finished).toEqual([1, 3, 2]);
    harness.expectNothingLeft();
  });
});

describe("Engine under random load", () => {
  const seed = testSeed();

  /** Requests of a few conversations that fork and repeat, at random times. */
  function randomRequests(random: SeededRandom, maxModelLen: number): EngineRequest[] {
    const stems = Array.from({ length: 3 }, () => prompt(random.integer(1, maxModelLen / 2), random.integer(0, 9)));
    return Array.from({ length: random.integer(6, 16) }, (_, i) => {
      const stem = stems[random.integer(0, 2)]!;
      const kept = stem.slice(0, random.integer(1, stem.length));
      const tokens = [...kept, ...prompt(random.integer(0, 12), random.integer(0, 3))];
      const room = maxModelLen - tokens.length;
      return {
        id: i,
        tokens: Int32Array.from(tokens),
        salt: random.next() < 0.8 ? new Uint8Array(32) : SALT_OTHER,
        sampling: {
          ...GREEDY,
          temperature: random.next() < 0.5 ? 0 : 1,
          seed: random.integer(0, 2 ** 40),
          ignoreEos: random.next() < 0.5,
          logitBias: random.next() < 0.2 ? [[1, 0]] : [],
        },
        choiceCount: random.next() < 0.25 ? random.integer(2, 4) : 1,
        maxTokens: Math.min(room, random.integer(1, 24)),
        isTruncating: false,
        rewrittenTokens: 0,
        keep: {},
        isHeld: false,
        receivedAtMs: 0,
        deadlineAtMs: 1e12,
      };
    });
  }

  function randomHarness(random: SeededRandom, maxModelLen: number): EngineHarness {
    const blockTokens = 2 ** random.integer(1, 4);
    const least = Math.ceil((maxModelLen + 1) / blockTokens) + 1;
    const maxSequences = random.integer(1, 6);
    return new EngineHarness({
      blockTokens,
      layers: random.integer(1, 3),
      maxModelLen,
      maxSequences,
      gpuBlocks: least + (random.next() < 0.6 ? random.integer(0, 4) : 100),
      maxBatchTokens: maxSequences + random.integer(0, 30),
      maxBiases: random.integer(1, 3),
    });
  }

  test(`batching changes no token (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    let preemptions = 0;
    for (let round = 0; round < 60; round++) {
      const harness = randomHarness(random, 64);
      const requests = randomRequests(random, 64);
      const ids: number[] = [];
      for (let turn = 0; ids.length < requests.length || !harness.engine.isIdle; turn++) {
        expect(turn, "the engine does not come to an end").toBeLessThan(20_000);
        if (ids.length < requests.length && random.next() < 0.3) {
          const request = requests[ids.length]!;
          ids.push(harness.submit(Array.from(request.tokens), { ...request, id: ids.length + 1 }));
        }
        harness.step();
        if (random.next() < 0.6) harness.runner.finishStep();
        harness.cache.checkInvariants();
      }
      requests.forEach((request, i) => {
        for (let choice = 0; choice < request.choiceCount; choice++) {
          expectReference(harness, ids[i]!, request, choice);
        }
      });
      preemptions += harness.engine.stats().preemptions;
      harness.expectNothingLeft();
    }
    expect(preemptions).toBeGreaterThan(10);
  });

  test(`aborts, deadlines and failures at any time leave nothing behind (seed ${seed})`, () => {
    const random = new SeededRandom(seed + 1);
    for (let round = 0; round < 60; round++) {
      const harness = randomHarness(random, 64);
      const requests = randomRequests(random, 64);
      const ids: number[] = [];
      const disturbed = new Set<number>();
      for (let turn = 0; ids.length < requests.length || !harness.engine.isIdle; turn++) {
        expect(turn, "the engine does not come to an end").toBeLessThan(20_000);
        harness.nowMs += 1;
        if (ids.length < requests.length && random.next() < 0.3) {
          const request = requests[ids.length]!;
          const isShort = random.next() < 0.2;
          const deadlineAtMs = isShort ? harness.nowMs + random.integer(1, 30) : 1e12;
          const id = ids.length + 1;
          if (isShort) disturbed.add(id);
          ids.push(harness.submit(Array.from(request.tokens), { ...request, id, deadlineAtMs }));
        }
        if (ids.length > 0 && random.next() < 0.05) {
          const index = random.integer(0, ids.length - 1);
          const isAll = random.next() < 0.5;
          const choice = isAll ? null : random.integer(0, requests[index]!.choiceCount - 1);
          harness.engine.abort(ids[index]!, choice, "abort");
          disturbed.add(ids[index]!);
        }
        harness.step();
        if (random.next() < 0.6) harness.runner.finishStep();
        harness.cache.checkInvariants();
      }
      requests.forEach((request, i) => {
        const id = ids[i]!;
        for (let choice = 0; choice < request.choiceCount; choice++) {
          if (!disturbed.has(id)) expectReference(harness, id, request, choice);
          else expectBeginningOf(harness, id, request, choice);
        }
      });
      harness.expectNothingLeft();
    }
  });

  function expectBeginningOf(harness: EngineHarness, id: number, request: EngineRequest, choice: number): void {
    const { tokens, finish } = harness.answer(id, choice);
    const sampling = { ...request.sampling, seed: request.sampling.seed + choice };
    const expected = harness.reference({ ...request, sampling });
    expect(tokens).toEqual(expected.tokens.slice(0, tokens.length));
    if (finish === null) expect(harness.fails.get(id)!.code).toBe("deadline_exceeded");
  }
});
