// generation_config.json: the tokens that end an answer, and the sampling that the model's makers recommend.

import { join } from "node:path";
import { JsonFields } from "./json-fields.ts";

export interface GenerationConfig {
  readonly eosTokens: ReadonlySet<number>;
  /** Recommended; null where the makers say nothing. */
  readonly temperature: number | null;
  readonly topK: number | null;
  readonly topP: number | null;
  readonly minP: number | null;
  readonly repetitionPenalty: number | null;
}

/** End tokens come from config.json where there is no generation_config.json. Throws ModelError. */
export function loadGenerationConfig(directory: string): GenerationConfig {
  const config = JsonFields.read(join(directory, "config.json"));
  const file = join(directory, "generation_config.json");
  const generation = JsonFields.readOptional(file) ?? new JsonFields(file, {});
  const isGreedy = generation.has("do_sample") && !generation.flag("do_sample", false);
  const optional = (field: string): number | null =>
    generation.has(field) ? generation.positive(field) : null;
  return Object.freeze({
    eosTokens: new Set(readTokenIds(generation.has("eos_token_id") ? generation : config, "eos_token_id")),
    temperature: isGreedy ? 0 : optional("temperature"),
    topK: generation.has("top_k") ? generation.count("top_k", undefined, 0) : null,
    topP: optional("top_p"),
    minP: optional("min_p"),
    repetitionPenalty: optional("repetition_penalty"),
  });
}

function readTokenIds(fields: JsonFields, field: string): number[] {
  if (!fields.has(field)) return [];
  const value = fields.values[field];
  const ids = Array.isArray(value) ? value : [value];
  if (!ids.every((id) => Number.isSafeInteger(id) && id >= 0)) {
    fields.refuse(field, `must be a token id or a list of them, not ${JSON.stringify(value)}`);
  }
  return ids;
}
