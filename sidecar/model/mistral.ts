// Mistral: Llama's layer without biases; the first versions attend to a sliding window of positions in every
// layer.

import type { Family } from "./decoder.ts";
import { GatedDecoder } from "./gated-decoder.ts";
import { type GatedConfig, readGatedBase, readWindows } from "./model-config.ts";

export const mistral: Family<GatedConfig> = {
  readConfig(fields) {
    const base = readGatedBase(fields);
    const window = fields.has("sliding_window") ? fields.count("sliding_window") : 0;
    return {
      family: "mistral",
      ...base,
      windows: readWindows(fields, base.layers, window, 0),
      hasQkvBias: false,
      hasAttentionOutputBias: false,
      hasMlpBias: false,
      hasQkNorm: false,
    };
  },
  load: (config, source) => new GatedDecoder(config, source),
};
