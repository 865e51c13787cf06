// A model loaded from its directory: shards, dtypes, hooks, fingerprint, made-up weights.

import { describe, expect, test } from "bun:test";
import { cpSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { ForwardHooks } from "../../../sidecar/model/decoder.ts";
import { loadModel } from "../../../sidecar/model/model.ts";
import { readTensor, SafetensorsFile } from "../../../sidecar/model/safetensors.ts";
import { cpuLibraryPath } from "../../support/cpu-library.ts";
import { expectSameBits, worstDeviation } from "../../support/logits.ts";
import { ModelDirectory, safetensorsBytes, type TestTensor } from "../../support/model-directory.ts";
import { TestModel, type TestModelOptions } from "../../support/test-model.ts";

const LLAMA = join(import.meta.dir, "../../golden/models/llama-mha");
const IDS = Int32Array.from({ length: 30 }, (_, i) => (i * 37 + 11) % 512);

/** A model's logits of IDS. */
async function logitsOf(directory: string, options: TestModelOptions = {}): Promise<Float32Array> {
  using model = await TestModel.load(directory, options);
  return model.step([{ sequence: model.sequence(), ids: IDS }])[0]!;
}

async function fingerprintOf(directory: string, options: TestModelOptions = {}): Promise<string> {
  using model = await TestModel.load(directory, options);
  return model.model.fingerprint;
}

/** The tensors of the Llama golden as numbers, stored in another dtype. */
function tensorsAs(dtype: "F32" | "F16" | "BF16"): [string, TestTensor][] {
  const file = new SafetensorsFile(join(LLAMA, "model.safetensors"));
  const tensors = [...file.tensors.values()].map((info): [string, TestTensor] => [
    info.name,
    { shape: info.shape, values: readTensor(file, info), dtype },
  ]);
  file.close();
  return tensors;
}

const CONFIG = readFileSync(join(LLAMA, "config.json"), "utf8");

describe("a model", () => {
  test("gives the same bits from shards as from one file", async () => {
    const tensors = tensorsAs("BF16");
    const half = Math.floor(tensors.length / 2);
    const shards = {
      "model-00001-of-00002.safetensors": tensors.slice(0, half),
      "model-00002-of-00002.safetensors": tensors.slice(half),
    };
    using directory = new ModelDirectory({ "config.json": CONFIG });
    const weight_map: Record<string, string> = {};
    for (const [name, part] of Object.entries(shards)) {
      directory.write(name, safetensorsBytes(Object.fromEntries(part)));
      for (const [tensor] of part) weight_map[tensor] = name;
    }
    directory.write("model.safetensors.index.json", { weight_map });
    expectSameBits(await logitsOf(directory.path), await logitsOf(LLAMA));
    expect(await fingerprintOf(directory.path)).toBe(await fingerprintOf(LLAMA));
  });

  for (const dtype of ["F32", "F16"] as const) {
    test(`reads ${dtype} weights`, async () => {
      const tensors = safetensorsBytes(Object.fromEntries(tensorsAs(dtype)));
      using directory = new ModelDirectory({ "config.json": CONFIG, "model.safetensors": tensors });
      // F16 loses what lies below its smallest numbers.
      const [actual, expected] = [await logitsOf(directory.path), await logitsOf(LLAMA)];
      expect(worstDeviation(actual, expected, 512)).toBeLessThan(dtype === "F32" ? 1e-5 : 1e-3);
    });
  }

  test("calls its hooks around each layer's KV, and computes the same with them", async () => {
    using model = await TestModel.load(LLAMA);
    const calls: string[] = [];
    const hooks: ForwardHooks = {
      beforeAttention: (layer) => calls.push(`before ${layer}`),
      afterLayer: (layer) => calls.push(`after ${layer}`),
    };
    const hooked = model.step([{ sequence: model.sequence(), ids: IDS }], hooks)[0]!;
    expect(calls).toEqual(["before 0", "after 0", "before 1", "after 1", "before 2", "after 2"]);
    expectSameBits(hooked, model.step([{ sequence: model.sequence(), ids: IDS }])[0]!);
  });

  test("decodes a padded batch as it decodes each sequence alone", async () => {
    using padded = await TestModel.load(LLAMA);
    using plain = await TestModel.load(LLAMA);
    const prompts = [IDS, IDS.subarray(3, 20), IDS.subarray(9)];
    // Three sequences do not fill a graph of four rows.
    const batch = prompts.map((ids) => {
      const sequence = padded.sequence();
      padded.prefill(sequence, ids.subarray(0, -1));
      return { sequence, ids: ids.subarray(-1) };
    });
    const alone = prompts.map((ids) => {
      const logits = plain.step([{ sequence: plain.sequence(), ids }])[0]!.slice(-512);
      return logits.indexOf(Math.max(...logits));
    });
    expect(padded.greedyStep(batch)).toEqual(alone);
  });

  test("has the end tokens and the length of its files", async () => {
    using model = await TestModel.load(LLAMA);
    expect([...model.model.eosTokens]).toEqual([2]);
    expect(model.model.maxModelLen).toBe(512);
    using short = await TestModel.load(LLAMA, { maxModelLen: 100 });
    expect(short.model.maxModelLen).toBe(100);
  });
});

describe("a model's fingerprint", () => {
  test("depends on what it computes with, and not on where it lies", async () => {
    using directory = new ModelDirectory();
    cpSync(LLAMA, directory.path, { recursive: true });
    const original = await fingerprintOf(LLAMA);
    expect(await fingerprintOf(directory.path)).toBe(original);
    expect(await fingerprintOf(LLAMA, { kvDtype: "bf16" })).not.toBe(original);
    expect(await fingerprintOf(LLAMA, { blockTokens: 16 })).not.toBe(original);

    const path = directory.file("model.safetensors");
    const bytes = readFileSync(path);
    bytes[bytes.length - 100]! ^= 1;
    writeFileSync(path, bytes);
    expect(await fingerprintOf(directory.path)).not.toBe(original);

    cpSync(LLAMA, directory.path, { recursive: true });
    const rope_parameters = { rope_theta: 20000, rope_type: "default" };
    const config = { ...(JSON.parse(CONFIG) as object), rope_parameters };
    directory.write("config.json", config);
    expect(await fingerprintOf(directory.path)).not.toBe(original);
  });
});

describe("made-up weights", () => {
  test("need only config.json, and are the same every time", async () => {
    using directory = new ModelDirectory({ "config.json": CONFIG });
    const fingerprints = new Set<string>();
    for (let i = 0; i < 2; i++) {
      const model = await loadModel({
        libraryPath: cpuLibraryPath,
        directory: directory.path,
        randomWeights: true,
        maxModelLen: null,
        maxRows: 8,
        maxSequences: 2,
        blockTokens: 8,
        kvDtype: "auto",
        computeDtype: "auto",
        quantization: "none",
        threads: 1,
        gpuIndex: 0,
        onProgress: () => {},
      });
      expect(model.device.config.kvDtype).toBe("bf16");
      fingerprints.add(model.fingerprint);
      model.device.close();
    }
    expect(fingerprints.size).toBe(1);
    expect(fingerprints.has(await fingerprintOf(LLAMA))).toBe(false);
  });
});
