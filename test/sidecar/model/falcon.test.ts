// Variants of Falcon without a golden, against a plain double-precision computation; that one against the
// goldens first.

import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { readTensor, SafetensorsFile } from "../../../sidecar/model/safetensors.ts";
import { falconReference } from "../../support/falcon-reference.ts";
import { joined, worstDeviation } from "../../support/logits.ts";
import { type FalconVariant, randomFalcon } from "../../support/random-falcon.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";
import { TestModel } from "../../support/test-model.ts";

const GOLDENS = join(import.meta.dir, "../../golden/models");

describe("the plain computation", () => {
  for (const family of ["falcon-7b-mqa", "falcon-40b-gqa"]) {
    test(`agrees with the reference implementation on ${family}`, () => {
      const file = new SafetensorsFile(join(GOLDENS, family, "golden.safetensors"));
      const ids = readTensor(file, file.tensors.get("input_ids")!).subarray(0, 16);
      const expected = readTensor(file, file.tensors.get("logits")!);
      file.close();
      const actual = falconReference(join(GOLDENS, family), ids);
      const vocabSize = actual[0]!.length;
      const flat = actual.flatMap((row) => Array.from(row));
      expect(worstDeviation(flat, expected.subarray(0, flat.length), vocabSize)).toBeLessThan(1e-5);
    });
  }
});

const VARIANTS: Record<string, FalconVariant> = {
  "ALiBi, ungrouped heads, biases, the MLP after attention": {
    new_decoder_architecture: false,
    multi_query: false,
    parallel_attn: false,
    alibi: true,
    bias: true,
  },
  "ALiBi, multi-query, parallel": {
    new_decoder_architecture: false,
    multi_query: true,
    parallel_attn: true,
    alibi: true,
    bias: false,
  },
  "ALiBi, grouped heads, biases": {
    new_decoder_architecture: true,
    multi_query: false,
    parallel_attn: true,
    alibi: true,
    bias: true,
    num_kv_heads: 2,
  },
  "RoPE, ungrouped heads, biases": {
    new_decoder_architecture: false,
    multi_query: false,
    parallel_attn: true,
    alibi: false,
    bias: true,
  },
};

describe("Falcon", () => {
  for (const [name, variant] of Object.entries(VARIANTS)) {
    const seed = testSeed();
    test(`with ${name} gives the logits of the plain computation (SEED=${seed})`, async () => {
      using directory = randomFalcon(variant, seed);
      const random = new SeededRandom(seed);
      const ids = Int32Array.from({ length: 40 }, () => random.integer(0, 95));
      const expected = falconReference(directory.path, ids);
      using model = await TestModel.load(directory.path);
      const sequence = model.sequence();
      const first = model.step([{ sequence, ids: ids.subarray(0, 17) }])[0]!;
      const second = model.step([{ sequence, ids: ids.subarray(17) }])[0]!;
      const flat = expected.flatMap((row) => Array.from(row));
      expect(worstDeviation(joined([first, second]), flat, 96)).toBeLessThan(1e-3);
    });
  }
});
