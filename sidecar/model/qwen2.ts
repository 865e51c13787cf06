// Qwen2 and Qwen2.5: Llama's layer with biases on q, k and v alone; upper layers may attend to a sliding
// window.

import type { Family } from "./decoder.ts";
import { GatedDecoder } from "./gated-decoder.ts";
import { type GatedConfig, readGatedBase, readQwenWindows } from "./model-config.ts";

export const qwen2: Family<GatedConfig> = {
  readConfig(fields) {
    const base = readGatedBase(fields);
    return {
      family: "qwen2",
      ...base,
      windows: readQwenWindows(fields, base.layers),
      hasQkvBias: true,
      hasAttentionOutputBias: false,
      hasMlpBias: false,
      hasQkNorm: false,
    };
  },
  load: (config, source) => new GatedDecoder(config, source),
};
