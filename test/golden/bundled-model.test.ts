// The bundled model against the reference implementation, and what its card promises: it remembers what it
// was told.

import { afterAll, beforeEach, describe, expect, test } from "bun:test";
import { readTensor, SafetensorsFile } from "../../sidecar/model/safetensors.ts";
import { worstDeviation } from "../support/logits.ts";
import { BUNDLED_MODEL, readRecall, RecallRunner } from "../support/recall.ts";
import { TestModel } from "../support/test-model.ts";

const GOLDEN = `${BUNDLED_MODEL}/eval/golden.safetensors`;
const model = await TestModel.load(BUNDLED_MODEL, { blockTokens: 64 });

afterAll(() => model[Symbol.dispose]());
beforeEach(() => model.reset());

describe("the bundled model", () => {
  const file = new SafetensorsFile(GOLDEN);
  const read = (name: string) => readTensor(file, file.tensors.get(name)!);
  for (let prompt = 0; file.tensors.has(`${prompt}.input_ids`); prompt++) {
    const ids = read(`${prompt}.input_ids`) as Int32Array;
    const logits = read(`${prompt}.logits`);
    const greedyIds = [...read(`${prompt}.greedy_ids`)];

    test(`gives the reference's logits and tokens after ${ids.length} tokens`, () => {
      const sequence = model.sequence();
      model.prefill(sequence, ids.subarray(0, -1));
      const last = model.step([{ sequence, ids: ids.subarray(-1) }])[0]!;
      expect(worstDeviation(last, logits, logits.length)).toBeLessThan(1e-3);
      const first = last.indexOf(Math.max(...last));
      const rest = model.greedy(sequence, Int32Array.of(first), greedyIds.length - 1);
      expect([first, ...rest]).toEqual(greedyIds);
    });
  }

  test("remembers what it was told in earlier turns", async () => {
    // The card's worst buckets say 96 %: of a few near items all should be right. test/bench/recall.ts runs
    // all.
    const items = readRecall().filter(({ bucket, id }) => bucket <= 300 && /-[0-5]$/.test(id));
    expect(items).toHaveLength(12);
    const runner = await RecallRunner.create(model);
    const wrong = items.filter((item) => runner.answer(item) !== item.expected).map(({ id }) => id);
    expect(wrong).toEqual([]);
  });
});
