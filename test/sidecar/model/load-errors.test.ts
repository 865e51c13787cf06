// What is wrong with a model is said before the compute library is even loaded.

import { describe, expect, test } from "bun:test";
import { loadModel, type LoadModelOptions } from "../../../sidecar/model/model.ts";
import { ModelError } from "../../../sidecar/model/model-error.ts";
import { NativeError } from "../../../sidecar/native.ts";
import { ModelDirectory, safetensorsBytes, type TestTensor } from "../../support/model-directory.ts";

const CONFIG = {
  architectures: ["LlamaForCausalLM"],
  vocab_size: 4,
  hidden_size: 8,
  intermediate_size: 6,
  num_hidden_layers: 1,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  max_position_embeddings: 64,
};

const SHAPES: Record<string, number[]> = {
  "model.embed_tokens.weight": [4, 8],
  "model.layers.0.input_layernorm.weight": [8],
  "model.layers.0.self_attn.q_proj.weight": [8, 8],
  "model.layers.0.self_attn.k_proj.weight": [4, 8],
  "model.layers.0.self_attn.v_proj.weight": [4, 8],
  "model.layers.0.self_attn.o_proj.weight": [8, 8],
  "model.layers.0.post_attention_layernorm.weight": [8],
  "model.layers.0.mlp.gate_proj.weight": [6, 8],
  "model.layers.0.mlp.up_proj.weight": [6, 8],
  "model.layers.0.mlp.down_proj.weight": [8, 6],
  "model.norm.weight": [8],
  "lm_head.weight": [4, 8],
};

function directoryOf(shapes: Record<string, readonly number[]>, config: object = {}): ModelDirectory {
  const tensors = Object.entries(shapes).map(([name, shape]): [string, TestTensor] => [
    name,
    { shape, values: new Array<number>(shape.reduce((a, b) => a * b, 1)).fill(0.5) },
  ]);
  return new ModelDirectory({
    "config.json": { ...CONFIG, ...config },
    "model.safetensors": safetensorsBytes(Object.fromEntries(tensors)),
  });
}

async function load(
  directory: ModelDirectory,
  options: Partial<LoadModelOptions> = {},
): Promise<{ error: Error; messages: string[] }> {
  const messages: string[] = [];
  const loading = loadModel({
    libraryPath: "no-such-library.so",
    directory: directory.path,
    randomWeights: false,
    maxModelLen: null,
    maxRows: 8,
    maxSequences: 2,
    blockTokens: 8,
    kvDtype: "auto",
    computeDtype: "auto",
    quantization: "none",
    threads: 1,
    gpuIndex: 0,
    onProgress: (message) => messages.push(message),
    ...options,
  });
  return { error: (await loading.catch((error: unknown) => error)) as Error, messages };
}

describe("loading a model", () => {
  test("finds nothing wrong with one that is whole, and then asks for the library", async () => {
    using directory = directoryOf(SHAPES);
    const { error, messages } = await load(directory);
    expect(error).toBeInstanceOf(NativeError);
    expect(error.message).toContain("cannot load no-such-library.so");
    expect(messages).toEqual([]);
  });

  test("names a missing tensor and its file", async () => {
    const { "model.layers.0.mlp.up_proj.weight": _, ...rest } = SHAPES;
    using directory = directoryOf(rest);
    const { error } = await load(directory);
    expect(error).toBeInstanceOf(ModelError);
    expect(error.message).toBe(
      `${directory.file("model.safetensors")}: model.layers.0.mlp.up_proj.weight: this tensor is missing`,
    );
  });

  test("names a tensor of the wrong shape, and both shapes", async () => {
    using directory = directoryOf({ ...SHAPES, "model.layers.0.self_attn.k_proj.weight": [8, 8] });
    const { error } = await load(directory);
    expect(error.message).toContain(
      "model.layers.0.self_attn.k_proj.weight: has shape [8, 8], but config.json asks for [4, 8]",
    );
  });

  test("wants an output matrix only when the embedding is not it", async () => {
    const { "lm_head.weight": _, ...tied } = SHAPES;
    using untied = directoryOf(tied);
    expect((await load(untied)).error.message).toContain("lm_head.weight: this tensor is missing");
    using directory = directoryOf(tied, { tie_word_embeddings: true });
    expect((await load(directory)).error).toBeInstanceOf(NativeError);
  });

  test("wants the biases that config.json announces", async () => {
    using directory = directoryOf(SHAPES, { mlp_bias: true });
    expect((await load(directory)).error.message).toContain("mlp.gate_proj.bias: this tensor is missing");
  });

  test("names a tensor whose dtype it cannot read", async () => {
    using directory = directoryOf(SHAPES);
    const path = directory.file("model.safetensors");
    const bytes = Buffer.from(await Bun.file(path).arrayBuffer());
    const at = bytes.indexOf('"F32"', bytes.indexOf("model.norm.weight"));
    bytes.write('"I32"', at);
    await Bun.write(path, bytes);
    const { error } = await load(directory);
    expect(error.message).toContain("model.norm.weight: dtype I32 is not supported");
  });

  test("says which tensors it has no use for", async () => {
    using directory = directoryOf({ ...SHAPES, "model.layers.0.self_attn.q_proj.bias": [8] });
    const { messages } = await load(directory);
    expect(messages).toEqual([
      "tensors of the model that are not used: 1 (model.layers.0.self_attn.q_proj.bias)",
    ]);
  });

  test("refuses a context that is longer than the model's", async () => {
    using directory = directoryOf(SHAPES);
    const { error } = await load(directory, { maxModelLen: 65 });
    expect(error.message).toContain("max_position_embeddings: the model was made for 64 tokens");
  });

  test("refuses to quantise where nothing multiplies what comes of it", async () => {
    using directory = directoryOf(SHAPES);
    const onCpu = await load(directory, { quantization: "fp8" });
    expect(onCpu.error.message).toEndWith("--quantization fp8: needs a GPU: the CPU library multiplies no FP8");
    const libraryPath = "no-such-libkvasir_cuda.so";
    const inF32 = await load(directory, { quantization: "fp8", computeDtype: "f32", libraryPath });
    expect(inF32.error.message).toEndWith("is for 16-bit activations: --compute-dtype bf16 or f16");
    const onGpu = await load(directory, { quantization: "fp8", libraryPath });
    expect(onGpu.error).toBeInstanceOf(NativeError);
  });

  test("names missing weights", async () => {
    using directory = new ModelDirectory({ "config.json": CONFIG });
    expect((await load(directory)).error.message).toContain("there are no weights");
    expect((await load(directory, { randomWeights: true })).error).toBeInstanceOf(NativeError);
  });
});
