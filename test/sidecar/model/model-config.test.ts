// config.json of real models in its old and new spelling, and what is wrong with broken ones.

import { describe, expect, test } from "bun:test";
import { loadModelConfig, parseModelConfig } from "../../../sidecar/model/architecture.ts";
import { loadGenerationConfig } from "../../../sidecar/model/generation-config.ts";
import { JsonFields } from "../../../sidecar/model/json-fields.ts";
import type { ModelConfig } from "../../../sidecar/model/model-config.ts";
import { ModelError } from "../../../sidecar/model/model-error.ts";
import { alibiSlopes } from "../../../sidecar/model/rope.ts";
import { ModelDirectory } from "../../support/model-directory.ts";

const LLAMA = {
  architectures: ["LlamaForCausalLM"],
  vocab_size: 32000,
  hidden_size: 4096,
  intermediate_size: 11008,
  num_hidden_layers: 4,
  num_attention_heads: 32,
};
const QWEN2 = { ...LLAMA, architectures: ["Qwen2ForCausalLM"] };
const FALCON = {
  architectures: ["FalconForCausalLM"],
  vocab_size: 65024,
  hidden_size: 4544,
  num_hidden_layers: 2,
  num_attention_heads: 71,
};

function parse(values: object): ModelConfig {
  return parseModelConfig(new JsonFields("config.json", values as Record<string, unknown>));
}

function refusal(values: object): string {
  try {
    parse(values);
  } catch (error) {
    expect(error).toBeInstanceOf(ModelError);
    return (error as Error).message;
  }
  throw new Error("nothing was refused");
}

describe("config.json", () => {
  test("of the first Llama is read with its defaults", () => {
    const config = parse(LLAMA);
    expect(config).toMatchObject({ family: "llama", kvHeads: 32, headDim: 128, isTied: false });
    expect(config.maxPositions).toBe(2048);
    expect(config.rope!.inverseFrequencies).toHaveLength(64);
    expect(Object.isFrozen(config)).toBe(true);
  });

  test("reads the old spelling of rope and dtype as it reads the new one", () => {
    const frequencies = { low_freq_factor: 1, high_freq_factor: 4 };
    const scaling = { factor: 8, ...frequencies, original_max_position_embeddings: 8192 };
    const old = parse({
      ...LLAMA,
      rope_theta: 500000,
      rope_scaling: { rope_type: "llama3", ...scaling },
      torch_dtype: "float16",
    });
    const latest = parse({
      ...LLAMA,
      rope_parameters: { rope_theta: 500000, rope_type: "llama3", ...scaling },
      dtype: "float16",
    });
    expect(latest).toEqual(old);
    expect(latest.dtype).toBe("f16");
  });

  test("reads linear scaling, also under its oldest name", () => {
    const plain = parse(LLAMA).rope!.inverseFrequencies;
    const scaled = parse({ ...LLAMA, rope_scaling: { type: "linear", factor: 4 } }).rope!.inverseFrequencies;
    expect([...scaled]).toEqual([...plain].map((frequency) => frequency / 4));
  });

  test("gives every layer of Mistral its window, and none where it is null", () => {
    const mistral = { ...LLAMA, architectures: ["MistralForCausalLM"] };
    expect(parse({ ...mistral, sliding_window: 4096 }).windows).toEqual([4096, 4096, 4096, 4096]);
    expect(parse({ ...mistral, sliding_window: null }).windows).toEqual([0, 0, 0, 0]);
  });

  test("gives Qwen's upper layers a window only when it is switched on", () => {
    const window = { sliding_window: 1024, max_window_layers: 2 };
    expect(parse({ ...QWEN2, ...window }).windows).toEqual([0, 0, 0, 0]);
    expect(parse({ ...QWEN2, ...window, use_sliding_window: true }).windows).toEqual([0, 0, 1024, 1024]);
    const types = ["sliding_attention", "full_attention", "full_attention", "full_attention"];
    const typed = { ...QWEN2, ...window, use_sliding_window: true, layer_types: types };
    expect(parse(typed).windows).toEqual([1024, 0, 0, 0]);
  });

  test("knows which families have which biases and norms", () => {
    expect(parse(QWEN2)).toMatchObject({ hasQkvBias: true, hasAttentionOutputBias: false, hasQkNorm: false });
    const qwen3 = { ...LLAMA, architectures: ["Qwen3ForCausalLM"], head_dim: 128 };
    expect(parse(qwen3)).toMatchObject({ hasQkvBias: false, hasQkNorm: true });
    const biased = { ...LLAMA, attention_bias: true, mlp_bias: true };
    expect(parse(biased)).toMatchObject({ hasQkvBias: true, hasAttentionOutputBias: true, hasMlpBias: true });
  });

  test("tells Falcon's layouts apart", () => {
    expect(parse(FALCON)).toMatchObject({ kvHeads: 1, layout: "parallel1", isTied: true });
    const shape = { num_attention_heads: 71 * 2, hidden_size: 71 * 128 };
    const grouped = { ...FALCON, ...shape, new_decoder_architecture: true };
    expect(parse({ ...grouped, num_kv_heads: 2 })).toMatchObject({ kvHeads: 2, layout: "parallel2" });
    const oneNorm = { ...grouped, num_kv_heads: 2, num_ln_in_parallel_attn: 1 };
    expect(parse(oneNorm)).toMatchObject({ layout: "parallel1" });
    const rw = { hidden_size: 2048, num_attention_heads: 32, multi_query: false, alibi: true, bias: true };
    expect(parse({ ...FALCON, ...rw, parallel_attn: false })).toMatchObject({
      kvHeads: 32,
      rope: null,
      hasBias: true,
      layout: "sequential",
    });
  });

  test("reads the names of the first Falcon releases", () => {
    const { num_hidden_layers, num_attention_heads, ...rest } = FALCON;
    const old = { ...rest, n_layer: num_hidden_layers, n_head: num_attention_heads };
    expect(parse(old)).toEqual(parse(FALCON));
  });

  const refused: Record<string, [values: object, message: string]> = {
    "another architecture": [
      { ...LLAMA, architectures: ["MambaForCausalLM"] },
      'config.json: architectures: "MambaForCausalLM" is not supported (LlamaForCausalLM,',
    ],
    "no architecture": [{ ...LLAMA, architectures: undefined }, "config.json: architectures: is missing"],
    "another rope": [
      { ...LLAMA, rope_scaling: { rope_type: "yarn", factor: 4 } },
      'config.json: rope_scaling.rope_type: "yarn" is not supported',
    ],
    "a rope without its factor": [
      { ...LLAMA, rope_parameters: { rope_type: "linear" } },
      "config.json: rope_parameters.factor: is missing",
    ],
    "another activation": [{ ...LLAMA, hidden_act: "relu" }, 'hidden_act: "relu" is not supported'],
    quantization: [{ ...LLAMA, quantization_config: { bits: 4 } }, "quantization_config: quantized"],
    "a missing size": [{ ...LLAMA, hidden_size: undefined }, "config.json: hidden_size: is missing"],
    "a size of the wrong type": [{ ...LLAMA, hidden_size: "4096" }, "hidden_size: must be a number"],
    "a fractional size": [{ ...LLAMA, vocab_size: 1.5 }, "config.json: vocab_size: must be a whole number"],
    "heads that do not divide": [{ ...LLAMA, num_key_value_heads: 5 }, "do not share 5 key-value heads"],
    "another dtype": [{ ...LLAMA, torch_dtype: "int8" }, 'torch_dtype: "int8" is not supported'],
    "layer types that are too few": [
      { ...QWEN2, layer_types: ["full_attention"] },
      "layer_types: has 1 entries for 4 layers",
    ],
  };
  for (const [what, [values, message]] of Object.entries(refused)) {
    test(`with ${what} is refused by name`, () => {
      expect(refusal(values)).toContain(message);
    });
  }

  test("that is missing or broken is named", () => {
    using directory = new ModelDirectory();
    expect(() => loadModelConfig(directory.path)).toThrow(`${directory.file("config.json")}: cannot be read`);
    directory.write("config.json", "{");
    expect(() => loadModelConfig(directory.path)).toThrow(`${directory.file("config.json")}: is not JSON`);
  });
});

describe("generation_config.json", () => {
  test("gives all end tokens and the recommended sampling", () => {
    using directory = new ModelDirectory({
      "config.json": { eos_token_id: 2 },
      "generation_config.json": { eos_token_id: [128001, 128009], temperature: 0.6, top_p: 0.9 },
    });
    const generation = loadGenerationConfig(directory.path);
    expect([...generation.eosTokens]).toEqual([128001, 128009]);
    expect(generation).toMatchObject({ temperature: 0.6, topP: 0.9, topK: null });
  });

  test("may be missing: then config.json names the end token", () => {
    using directory = new ModelDirectory({ "config.json": { eos_token_id: 2 } });
    expect([...loadGenerationConfig(directory.path).eosTokens]).toEqual([2]);
  });
});

describe("ALiBi slopes", () => {
  test("halve from head to head with 8 heads", () => {
    expect([...alibiSlopes(8)]).toEqual([1, 2, 3, 4, 5, 6, 7, 8].map((power) => 2 ** -power));
  });

  test("of 12 heads take every other slope of 16 heads after those of 8", () => {
    const slopes = alibiSlopes(12);
    expect([...slopes.subarray(0, 8)]).toEqual([...alibiSlopes(8)]);
    expect([...slopes.subarray(8)]).toEqual([0, 2, 4, 6].map((head) => alibiSlopes(16)[head]!));
  });
});
