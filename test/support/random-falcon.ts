// Tiny Falcon models with random weights, in the variants for which there is no golden of the reference
// implementation.

import { SeededRandom } from "./seeded-random.ts";
import { ModelDirectory, safetensorsBytes, type TestTensor } from "./model-directory.ts";

export interface FalconVariant {
  readonly new_decoder_architecture: boolean;
  readonly multi_query: boolean;
  readonly parallel_attn: boolean;
  readonly alibi: boolean;
  readonly bias: boolean;
  readonly num_kv_heads?: number;
}

const HIDDEN = 64;
const HEADS = 4;
const LAYERS = 2;
const VOCAB = 96;

/** The caller disposes of the directory. */
export function randomFalcon(variant: FalconVariant, seed: number): ModelDirectory {
  const ungrouped = variant.multi_query ? 1 : HEADS;
  const kvHeads = variant.new_decoder_architecture ? variant.num_kv_heads! : ungrouped;
  return new ModelDirectory({
    "config.json": {
      architectures: ["FalconForCausalLM"],
      hidden_size: HIDDEN,
      num_attention_heads: HEADS,
      num_hidden_layers: LAYERS,
      vocab_size: VOCAB,
      max_position_embeddings: 256,
      torch_dtype: "float32",
      ...variant,
    },
    "model.safetensors": safetensorsBytes(randomTensors(variant, kvHeads, new SeededRandom(seed))),
  });
}

function randomTensors(
  variant: FalconVariant,
  kvHeads: number,
  random: SeededRandom,
): Record<string, TestTensor> {
  const tensors: Record<string, TestTensor> = {};
  const add = (name: string, shape: readonly number[], mean: number, deviation: number): void => {
    const length = shape.reduce((a, b) => a * b, 1);
    tensors[name] = { shape, values: Array.from({ length }, () => mean + deviation * random.normal()) };
  };
  const addNorm = (name: string): void => {
    add(`${name}.weight`, [HIDDEN], 1, 0.1);
    add(`${name}.bias`, [HIDDEN], 0, 0.1);
  };
  const addLinear = (name: string, rows: number, cols: number): void => {
    add(`${name}.weight`, [rows, cols], 0, 0.15);
    if (variant.bias) add(`${name}.bias`, [rows], 0, 0.2);
  };
  add("transformer.word_embeddings.weight", [VOCAB, HIDDEN], 0, 0.5);
  for (let layer = 0; layer < LAYERS; layer++) {
    const at = `transformer.h.${layer}`;
    const norms = variant.new_decoder_architecture ? ["ln_attn", "ln_mlp"] : ["input_layernorm"];
    if (!variant.parallel_attn) norms.push("post_attention_layernorm");
    for (const name of norms) addNorm(`${at}.${name}`);
    addLinear(`${at}.self_attention.query_key_value`, (HEADS + 2 * kvHeads) * (HIDDEN / HEADS), HIDDEN);
    addLinear(`${at}.self_attention.dense`, HIDDEN, HIDDEN);
    addLinear(`${at}.mlp.dense_h_to_4h`, 4 * HIDDEN, HIDDEN);
    addLinear(`${at}.mlp.dense_4h_to_h`, HIDDEN, 4 * HIDDEN);
  }
  addNorm("transformer.ln_f");
  return tensors;
}
