// The shapes of real models, for made-up weights: speed depends on nothing else.

import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** config.json by short name. */
export const SHAPES: Readonly<Record<string, Readonly<Record<string, unknown>>>> = {
  "13b": {
    model_type: "llama", architectures: ["LlamaForCausalLM"], hidden_size: 5120, intermediate_size: 13824,
    num_hidden_layers: 40, num_attention_heads: 40, num_key_value_heads: 40, vocab_size: 32000,
    max_position_embeddings: 16384, rope_theta: 10000, rms_norm_eps: 1e-5, hidden_act: "silu",
    tie_word_embeddings: false, torch_dtype: "bfloat16", bos_token_id: 1, eos_token_id: 2,
  },
  "8b": {
    model_type: "llama", architectures: ["LlamaForCausalLM"], hidden_size: 4096, intermediate_size: 14336,
    num_hidden_layers: 32, num_attention_heads: 32, num_key_value_heads: 8, vocab_size: 128256,
    max_position_embeddings: 16384, rope_theta: 500000, rms_norm_eps: 1e-5, hidden_act: "silu",
    tie_word_embeddings: false, torch_dtype: "bfloat16", bos_token_id: 128000, eos_token_id: 128001,
  },
  "32b": {
    model_type: "qwen2", architectures: ["Qwen2ForCausalLM"], hidden_size: 5120, intermediate_size: 27648,
    num_hidden_layers: 64, num_attention_heads: 40, num_key_value_heads: 8, vocab_size: 152064,
    max_position_embeddings: 16384, rope_theta: 1000000, rms_norm_eps: 1e-6, hidden_act: "silu",
    tie_word_embeddings: false, torch_dtype: "bfloat16", bos_token_id: 151643, eos_token_id: 151643,
  },
  // To try the bench itself without a GPU.
  tiny: {
    model_type: "llama", architectures: ["LlamaForCausalLM"], hidden_size: 64, intermediate_size: 128,
    num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 512,
    max_position_embeddings: 16384, rope_theta: 10000, rms_norm_eps: 1e-5, hidden_act: "silu",
    tie_word_embeddings: false, torch_dtype: "bfloat16", bos_token_id: 1, eos_token_id: 2,
  },
};

/** A model directory with nothing but a config. */
export function modelDirectory(shape: string): string {
  const config = SHAPES[shape];
  if (config === undefined) throw new Error(`no shape ${shape}: ${Object.keys(SHAPES).join(", ")}`);
  const directory = mkdtempSync(join(tmpdir(), `kvasir-${shape}-`));
  writeFileSync(join(directory, "config.json"), JSON.stringify(config));
  return directory;
}
