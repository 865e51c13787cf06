// Qwen3: Llama's layer with an RMS norm on every head of q and k before their rotation, in place of Qwen2's
// biases.

import type { Family } from "./decoder.ts";
import { GatedDecoder } from "./gated-decoder.ts";
import { type GatedConfig, readGatedBase, readQwenWindows } from "./model-config.ts";

export const qwen3: Family<GatedConfig> = {
  readConfig(fields) {
    const base = readGatedBase(fields);
    const hasAttentionBias = fields.flag("attention_bias", false);
    return {
      family: "qwen3",
      ...base,
      windows: readQwenWindows(fields, base.layers),
      hasQkvBias: hasAttentionBias,
      hasAttentionOutputBias: hasAttentionBias,
      hasMlpBias: false,
      hasQkNorm: true,
    };
  },
  load: (config, source) => new GatedDecoder(config, source),
};
