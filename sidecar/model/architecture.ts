// Which family a config.json belongs to: `architectures` names it.

import { join } from "node:path";
import type { Decoder } from "./decoder.ts";
import { falcon } from "./falcon.ts";
import { JsonFields } from "./json-fields.ts";
import { llama } from "./llama.ts";
import { mistral } from "./mistral.ts";
import type { ModelConfig } from "./model-config.ts";
import { qwen2 } from "./qwen2.ts";
import { qwen3 } from "./qwen3.ts";
import type { WeightSource } from "./weights.ts";

const FAMILIES = { llama, mistral, qwen2, qwen3, falcon } as const;

const FAMILY_OF: Readonly<Record<string, keyof typeof FAMILIES>> = {
  LlamaForCausalLM: "llama",
  MistralForCausalLM: "mistral",
  Qwen2ForCausalLM: "qwen2",
  Qwen3ForCausalLM: "qwen3",
  FalconForCausalLM: "falcon",
};

/** Throws ModelError. */
export function loadModelConfig(directory: string): ModelConfig {
  return parseModelConfig(JsonFields.read(join(directory, "config.json")));
}

/** Throws ModelError. */
export function parseModelConfig(fields: JsonFields): ModelConfig {
  const architecture = fields.texts("architectures")?.[0];
  if (architecture === undefined) fields.refuse("architectures", "is missing: it names the model's family");
  const family = FAMILY_OF[architecture];
  if (family === undefined) {
    const known = Object.keys(FAMILY_OF).join(", ");
    fields.refuse("architectures", `"${architecture}" is not supported (${known} are)`);
  }
  for (const field of ["quantization_config", "compression_config"]) {
    if (fields.has(field)) {
      fields.refuse(field, "quantized weights are not supported: use an F32, F16 or BF16 version");
    }
  }
  return Object.freeze(FAMILIES[family].readConfig(fields));
}

/** Declares the family's weights to the source. Throws ModelError when it lacks one. */
export function loadDecoder(config: ModelConfig, source: WeightSource): Decoder {
  return config.family === "falcon"
    ? FAMILIES.falcon.load(config, source)
    : FAMILIES[config.family].load(config, source);
}
