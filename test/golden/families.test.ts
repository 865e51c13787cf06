// Every architecture family against the reference implementation, and the CPU library's promise that a
// sequence's numbers do not depend on how its prompt is cut or who shares its steps.

import { afterAll, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { readTensor, SafetensorsFile } from "../../sidecar/model/safetensors.ts";
import { expectSameBits, joined, worstDeviation } from "../support/logits.ts";
import { SeededRandom, testSeed } from "../support/seeded-random.ts";
import { TestModel, type TestSequence } from "../support/test-model.ts";

const MODELS = join(import.meta.dir, "models");
const FAMILIES = [
  "llama-mha",
  "llama3-gqa",
  "mistral-swa",
  "qwen2-bias",
  "qwen3-qknorm",
  "falcon-7b-mqa",
  "falcon-40b-gqa",
] as const;
const TOLERANCE = 1e-3;
const BLOCK_TOKENS = 8;

interface Golden {
  readonly ids: Int32Array;
  readonly turnLengths: readonly number[];
  readonly logits: Float32Array;
  readonly greedyIds: readonly number[];
  /** Null for families that have none (a sliding window sees other tokens once some are dropped). */
  readonly truncated: { readonly drop: number; readonly logits: Float32Array } | null;
}

function readGolden(directory: string): Golden {
  const file = new SafetensorsFile(join(directory, "golden.safetensors"));
  const read = (name: string) => readTensor(file, file.tensors.get(name)!);
  const golden = {
    ids: read("input_ids") as Int32Array,
    turnLengths: [...read("turn_lengths")],
    logits: read("logits") as Float32Array,
    greedyIds: [...read("greedy_ids")],
    truncated: file.tensors.has("truncated_drop")
      ? { drop: read("truncated_drop")[0]!, logits: read("truncated_logits") as Float32Array }
      : null,
  };
  file.close();
  return golden;
}

/** Feeds ids in pieces of the given lengths, the last as long as it takes; returns the logits of all. */
function feed(
  model: TestModel,
  sequence: TestSequence,
  ids: Int32Array,
  nextLength: () => number,
): Float32Array {
  const logits: Float32Array[] = [];
  for (let at = 0; at < ids.length; ) {
    const piece = ids.subarray(at, at + nextLength());
    logits.push(model.step([{ sequence, ids: piece }])[0]!);
    at += piece.length;
  }
  return joined(logits);
}

for (const family of FAMILIES) {
  describe(family, () => {
    const directory = join(MODELS, family);
    const golden = readGolden(directory);
    const vocabSize = golden.logits.length / golden.ids.length;
    const seed = testSeed();
    let model: TestModel;
    let whole: Float32Array;

    beforeAll(async () => {
      model = await TestModel.load(directory, { blockTokens: BLOCK_TOKENS });
      whole = model.step([{ sequence: model.sequence(), ids: golden.ids }])[0]!;
    });
    afterAll(() => model[Symbol.dispose]());
    beforeEach(() => model.reset());

    test("gives the reference's logits at every position", () => {
      expect(worstDeviation(whole, golden.logits, vocabSize)).toBeLessThan(TOLERANCE);
    });

    test("continues greedily with the reference's tokens", () => {
      const ids = model.greedy(model.sequence(), golden.ids, golden.greedyIds.length);
      expect(ids).toEqual([...golden.greedyIds]);
    });

    test("gives the same bits when the prompt comes turn by turn", () => {
      const turns = golden.turnLengths[Symbol.iterator]();
      const logits = feed(model, model.sequence(), golden.ids, () => turns.next().value!);
      expectSameBits(logits, whole);
    });

    test(`gives the same bits in chunks of any size (SEED=${seed})`, () => {
      const random = new SeededRandom(seed);
      const logits = feed(model, model.sequence(), golden.ids, () => random.integer(1, 40));
      expectSameBits(logits, whole);
    });

    test("gives the same bits token by token", () => {
      expectSameBits(feed(model, model.sequence(), golden.ids, () => 1), whole);
    });

    test(`gives the same bits in a batch with others (SEED=${seed})`, () => {
      const random = new SeededRandom(seed);
      const sequence = model.sequence();
      const others = [model.sequence(), model.sequence(), model.sequence()];
      const logits: Float32Array[] = [];
      for (let at = 0; at < golden.ids.length; ) {
        const ids = golden.ids.subarray(at, at + random.integer(1, 30));
        at += ids.length;
        const otherRows = others
          .filter(() => random.next() < 0.7)
          .map((other) => ({
            sequence: other,
            ids: Array.from({ length: random.integer(1, 20) }, () => random.integer(0, vocabSize - 1)),
          }));
        const before = otherRows.splice(0, random.integer(0, otherRows.length));
        const step = model.step([...before, { sequence, ids }, ...otherRows]);
        logits.push(step[before.length]!);
      }
      expectSameBits(joined(logits), whole);
    });

    if (golden.truncated !== null) {
      const { drop, logits: expected } = golden.truncated;
      test("goes on from kept blocks at new positions after the first are dropped", () => {
        const [first, second] = golden.turnLengths as [number, number, number];
        const kept = first + second;
        const sequence = model.sequence();
        model.step([{ sequence, ids: golden.ids.subarray(0, kept) }]);
        // Dropping is leaving blocks out of the table: keys are stored relative to their block.
        expect(drop % BLOCK_TOKENS).toBe(0);
        const view = model.sequence(sequence.table.slice(drop / BLOCK_TOKENS), kept - drop);
        const logits = model.step([{ sequence: view, ids: golden.ids.subarray(kept) }])[0]!;
        expect(worstDeviation(logits, expected, vocabSize)).toBeLessThan(TOLERANCE);
      });
    }

    for (const options of [
      { blockTokens: 64 },
      { isa: "avx2", threads: 1 },
      { isa: "portable", blockTokens: 16 },
    ] as const) {
      test(`gives the reference's logits with ${JSON.stringify(options)}`, async () => {
        using other = await TestModel.load(directory, options);
        const logits = feed(other, other.sequence(), golden.ids, () => 70);
        expect(worstDeviation(logits, golden.logits, vocabSize)).toBeLessThan(TOLERANCE);
      });
    }

    test("stays near the reference with a bf16 KV cache", async () => {
      using other = await TestModel.load(directory, { kvDtype: "bf16" });
      const logits = feed(other, other.sequence(), golden.ids, () => 50);
      expect(worstDeviation(logits, golden.logits, vocabSize)).toBeLessThan(0.05);
    });
  });
}
