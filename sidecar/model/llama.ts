// Llama 1, 2, 3 and the many models of its shape: rotary positions, grouped key-value heads, gated SiLU MLP.
// Attention and MLP may have biases; the output matrix may be the embedding.

import type { Family } from "./decoder.ts";
import { GatedDecoder } from "./gated-decoder.ts";
import { type GatedConfig, readGatedBase } from "./model-config.ts";

export const llama: Family<GatedConfig> = {
  readConfig(fields) {
    const hasAttentionBias = fields.flag("attention_bias", false);
    return {
      family: "llama",
      ...readGatedBase(fields),
      hasQkvBias: hasAttentionBias,
      hasAttentionOutputBias: hasAttentionBias,
      hasMlpBias: fields.flag("mlp_bias", false),
      hasQkNorm: false,
    };
  },
  load: (config, source) => new GatedDecoder(config, source),
};
