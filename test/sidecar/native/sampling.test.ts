// Sampling: every setting against a reference in doubles, the distribution by a chi-square test, ties, broken logits,
// logprobs, and that the batch does not matter.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import type { RowSampling, SampledToken } from "../../../sidecar/model/batch.ts";
import { normals, OperationDevice, rowsOf } from "../../support/operation-device.ts";
import { keptWeights, philox, rightTokens, type SampledRow } from "../../support/sampling-reference.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const GREEDY: RowSampling = {
  temperature: 0, topK: 0, topP: 1, minP: 0, frequencyPenalty: 0, presencePenalty: 0, repetitionPenalty: 1, seed: 0,
  logitBias: [], logprobs: null,
};
const WARM: RowSampling = { ...GREEDY, temperature: 1 };
const MAX_ROWS = 64;
const NO_BLOCKS = new Int32Array(80).fill(-1);

const devices = new Map<number, OperationDevice>();

function deviceOf(vocabSize: number): OperationDevice {
  let operations = devices.get(vocabSize);
  if (operations === undefined) {
    operations = new OperationDevice({ vocabSize, maxRows: MAX_ROWS, maxSequences: MAX_ROWS, maxPositions: 512 });
    devices.set(vocabSize, operations);
  }
  return operations;
}
afterAll(() => devices.forEach((operations) => operations[Symbol.dispose]()));

/** Samples one token a row; row i is the last token of a sequence in slot i. */
function sampleAll(rows: readonly SampledRow[], samplings: readonly RowSampling[]): SampledToken[] {
  const vocabSize = rows[0]!.logits.length;
  const operations = deviceOf(vocabSize);
  const { device } = operations;
  const logits = new Float32Array(rows.length * vocabSize);
  rows.forEach((row, i) => {
    logits.set(Array.from(row.logits), i * vocabSize);
    device.writeTokens(i, 0, Int32Array.from(row.tokens));
  });
  const batch = operations.begin(
    rows.map((row, i) => ({
      ...rowsOf(i, row.tokens.length - 1, 1, NO_BLOCKS),
      logits: "last",
      sampling: samplings[i]!,
      promptLength: row.promptLength,
      rngPosition: row.rngPosition,
    })),
    { maxBiases: 1024 },
  );
  const address = operations.place(logits);
  device.sample({ logits: address, results: batch.resultsAddress, logitCount: rows.length });
  operations.finish();
  device.free(address);
  return rows.map((_, i) => batch.result(i));
}

function sampleOne(
  logits: ArrayLike<number>,
  sampling: Partial<RowSampling>,
  row: Partial<SampledRow> = {},
): SampledToken {
  const whole = { logits, tokens: [0], promptLength: 1, rngPosition: 0, ...row };
  return sampleAll([whole], [{ ...GREEDY, ...sampling }])[0]!;
}

describe("arg max", () => {
  test("takes the lowest id of equals, wherever they lie", () => {
    for (const [first, second] of [[0, 63], [5, 6], [17, 40], [62, 63]] as const) {
      const logits = new Float32Array(64).fill(-1);
      logits[first] = logits[second] = 3;
      expect(sampleOne(logits, {}).token).toBe(first);
    }
    expect(sampleOne(new Float32Array(64).fill(-7), {}).token).toBe(0);
  });

  test("finds the likeliest at every place of a ragged vocabulary", () => {
    for (let best = 0; best < 77; best++) {
      const logits = Float32Array.from({ length: 77 }, (_, id) => (id === best ? 1 : -((id * 7) % 13) - 2));
      expect(sampleOne(logits, {}).token).toBe(best);
    }
  });
});

describe("broken logits", () => {
  const good = Float32Array.from({ length: 77 }, (_, id) => Math.sin(id));

  test("give no token, at any temperature, and the next step still has one to read", () => {
    for (const [at, value] of [[0, NaN], [76, NaN], [40, NaN], [3, Infinity]] as const) {
      const logits = good.slice();
      logits[at] = value;
      for (const temperature of [0, 1]) {
        expect(sampleOne(logits, { temperature, logprobs: 2 })).toMatchObject({ token: -1, top: [] });
      }
    }
    expect(sampleOne(new Float32Array(77).fill(-Infinity), { temperature: 1 }).token).toBe(-1);
  });

  test("that are -inf in places are never chosen there", () => {
    const logits = good.map((value, id) => (id % 7 === 3 ? value : -Infinity));
    for (let rngPosition = 0; rngPosition < 50; rngPosition++) {
      expect(sampleOne(logits, { temperature: 3 }, { rngPosition }).token % 7).toBe(3);
    }
  });

  test("of one row leave its neighbours alone", () => {
    const row: SampledRow = { logits: good, tokens: [1], promptLength: 1, rngPosition: 0 };
    const broken = { ...row, logits: good.map(() => NaN) };
    const tokens = sampleAll([row, broken, row], [WARM, WARM, WARM]).map(({ token }) => token);
    expect(tokens[1]).toBe(-1);
    expect(tokens[2]).toBe(tokens[0]!);
  });
});

describe("a draw", () => {
  const seed = testSeed();

  test("uses Philox as published", () => {
    // Known answers of Random123 (kat_vectors, philox4x32 10): first words.
    expect(philox(0, 0)).toBe(0x6627e8d5);
    const logits = new Float32Array(77);
    for (const [key, position] of [[0, 0], [123456789012345, 7], [2 ** 53 - 1, 2 ** 32 - 1]] as const) {
      const uniform = (philox(key, position) >>> 8) * 2 ** -24;
      const { token } = sampleOne(logits, { temperature: 1, seed: key }, { rngPosition: position });
      expect(token).toBe(Math.floor(uniform * 77));
    }
  });

  test(`follows every setting as the reference does (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    for (let round = 0; round < 40; round++) {
      const vocabSize = [64, 77, 5000][round % 3]!;
      const rows: SampledRow[] = [];
      const samplings: RowSampling[] = [];
      for (let i = 0; i < (vocabSize === 5000 ? 4 : 20); i++) {
        rows.push({
          logits: normals(random, vocabSize).map((value) => value * 3),
          tokens: Array.from({ length: random.integer(1, 40) }, () => random.integer(0, 60)),
          promptLength: random.integer(0, 50),
          rngPosition: random.integer(0, 2 ** 32 - 1),
        });
        samplings.push(randomSampling(random, vocabSize));
      }
      sampleAll(rows, samplings).forEach(({ token }, i) => {
        expect([...rightTokens(rows[i]!, samplings[i]!)]).toContain(token);
      });
    }
  });

  test(`comes out as often as its probability says, by chi-square (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    const logits = normals(random, 77);
    const sampling: RowSampling = { ...WARM, temperature: 0.8, topK: 30, seed };
    const weights = keptWeights([...logits], sampling, 0);
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const counts = new Array<number>(77).fill(0);
    const draws = 12_800;
    for (let at = 0; at < draws; at += MAX_ROWS) {
      const rows = Array.from({ length: MAX_ROWS }, (_, i) => ({
        logits, tokens: [0], promptLength: 1, rngPosition: at + i,
      }));
      for (const { token } of sampleAll(rows, rows.map(() => sampling))) counts[token]!++;
    }
    let chiSquare = 0;
    weights.forEach((weight, id) => {
      const expected = (draws * weight) / total;
      if (expected === 0) expect(counts[id]).toBe(0);
      else chiSquare += (counts[id]! - expected) ** 2 / expected;
    });
    // 29 degrees of freedom: beyond 70 once in 30,000 runs.
    expect(chiSquare).toBeLessThan(70);
  });

  test("does not depend on the other rows of its step", () => {
    const random = new SeededRandom(3);
    const rows = Array.from({ length: 12 }, (_, i) => ({
      logits: normals(random, 77), tokens: [i, 3], promptLength: 1, rngPosition: i,
    }));
    const samplings = rows.map((_, i) => ({ ...WARM, topP: 0.9, seed: i }));
    const together = sampleAll(rows, samplings).map(({ token }) => token);
    const alone = rows.map((row, i) => sampleAll([row], [samplings[i]!])[0]!.token);
    expect(together).toEqual(alone);
  });

  test("at a temperature next to zero is the arg max, at a huge one any token", () => {
    const logits = Float32Array.from({ length: 77 }, (_, id) => (id === 50 ? 1.001 : 1));
    const tokens = new Set<number>();
    for (let rngPosition = 0; rngPosition < 100; rngPosition++) {
      for (const temperature of [1e-40, 1e-6]) {
        expect(sampleOne(logits, { temperature }, { rngPosition }).token).toBe(50);
      }
      tokens.add(sampleOne(logits, { temperature: 1e30 }, { rngPosition }).token);
    }
    expect(tokens.size).toBeGreaterThan(40);
  });

  test("among equals keeps the lowest ids of top_k and top_p", () => {
    const logits = new Float32Array(64);
    const seen = new Set<number>();
    for (let rngPosition = 0; rngPosition < 200; rngPosition++) {
      seen.add(sampleOne(logits, { temperature: 1, topK: 3 }, { rngPosition }).token);
      seen.add(sampleOne(logits, { temperature: 1, topP: 3 / 64 }, { rngPosition }).token);
    }
    expect([...seen].toSorted((a, b) => a - b)).toEqual([0, 1, 2]);
  });
});

function randomSampling(random: SeededRandom, vocabSize: number): RowSampling {
  const maybe = (value: number, off: number): number => (random.next() < 0.4 ? value : off);
  return {
    temperature: maybe(0, 0.2 + 1.5 * random.next()),
    topK: maybe(random.integer(1, vocabSize + 5), 0),
    topP: maybe(0.05 + 0.9 * random.next(), 1),
    minP: maybe(0.3 * random.next(), 0),
    frequencyPenalty: maybe(2 * random.normal(), 0),
    presencePenalty: maybe(2 * random.normal(), 0),
    repetitionPenalty: maybe(0.5 + random.next(), 1),
    seed: random.integer(0, 2 ** 53 - 1),
    logitBias: Array.from({ length: random.integer(0, 4) }, () => {
      return [random.integer(0, 60), 5 * random.normal()] as const;
    }),
    logprobs: null,
  };
}

describe("logprobs", () => {
  const seed = testSeed();

  test(`are those of the unchanged logits, likeliest first (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    for (const vocabSize of [77, 5000]) {
      const logits = normals(random, vocabSize).map((value) => 4 * value);
      const sampling = { temperature: 2, logitBias: [[13, 100]] as const, logprobs: 20 };
      const { token, logprob, top } = sampleOne(logits, sampling);
      expect(token).toBe(13);
      const total = logits.reduce((sum, logit) => sum + Math.exp(logit), 0);
      const logprobs = Array.from(logits, (logit) => logit - Math.log(total));
      expect(logprob).toBeCloseTo(logprobs[13]!, 4);
      const order = logprobs.map((_, id) => id).toSorted((a, b) => logprobs[b]! - logprobs[a]! || a - b);
      expect(top.map(({ id }) => id)).toEqual(order.slice(0, 20));
      for (const { id, logprob: ofTop } of top) expect(ofTop).toBeCloseTo(logprobs[id]!, 4);
    }
  });

  test("without rivals are the token's alone; not asked for, there are none", () => {
    const logits = Float32Array.of(...new Array<number>(63).fill(-100), 0);
    expect(sampleOne(logits, { logprobs: 0 })).toEqual({ token: 63, logprob: 0, top: [] });
    expect(sampleOne(logits, {})).toEqual({ token: 63, logprob: 0, top: [] });
  });
});

describe("the chosen token", () => {
  let operations: OperationDevice;
  beforeAll(() => (operations = new OperationDevice({ vocabSize: 64, hiddenSize: 1 })));
  afterAll(() => operations[Symbol.dispose]());

  test("is what the next step's embedding reads", () => {
    const { device } = operations;
    const weight = operations.weight(64, 1, "f32", Float32Array.from({ length: 64 }, (_, id) => id));
    device.writeTokens(4, 0, Int32Array.of(9, 9, 9));
    const batch = operations.begin([{ ...rowsOf(4, 1, 1, NO_BLOCKS), logits: "last", sampling: GREEDY }]);
    const logits = Float32Array.from({ length: 64 }, (_, id) => -Math.abs(id - 37));
    device.sample({ logits: operations.place(logits), results: batch.resultsAddress, logitCount: 1 });
    operations.begin([rowsOf(4, 0, 3, NO_BLOCKS)]);
    const y = operations.poisoned(3);
    device.embed({ y, weight, rowCount: 3 });
    expect([...operations.read(y, 3)]).toEqual([9, 9, 37]);
  });

  test("is none for rows whose logits alone are wanted, and padding writes nothing", () => {
    const batch = operations.begin([{ ...rowsOf(0, 0, 1, NO_BLOCKS), logits: "all", sampling: null }]);
    batch.padTo(2, 2);
    batch.seal();
    operations.device.beginStep(batch.stepAddress, batch.stepBytes);
    const results = operations.device.allocHost(2 * 176);
    new Int32Array(results.bytes).fill(77);
    const logits = operations.place(new Float32Array(128));
    operations.device.sample({ logits, results: results.address, logitCount: 2 });
    operations.finish();
    const words = new Int32Array(results.bytes);
    expect(words[0]).toBe(-1);
    expect([...words.subarray(44, 88)]).toEqual(new Array(44).fill(77));
  });
});
