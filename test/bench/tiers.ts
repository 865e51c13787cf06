// The KV cache's tiers on the CPU library: time to first token by where the history lies, layers that must be there
// first, what saving and checksums cost, and hit rates as the conversations outgrow the tiers.
//
//   bun run test/bench/tiers.ts [--parts history,preload,saving,checksum,working-set] [--models bundled,1b]
//     [--repeats 7] [--threads 2] [--plots DIRECTORY]

import { mkdirSync, writeFileSync } from "node:fs";
import { cpus, loadavg } from "node:os";
import { join } from "node:path";
import { ModelDirectory } from "../support/model-directory.ts";
import { BUNDLED_MODEL } from "../support/recall.ts";
import { openTinyDevice } from "../support/tiny-device.ts";
import { benchOptions } from "./bench-options.ts";
import { type HistoryPlan, measureHistories, sweepPreload } from "./tiers-history.ts";
import { measureChecksum, measureSaving } from "./tiers-saving.ts";
import { sweepWorkingSet } from "./tiers-working-set.ts";

const values = benchOptions(import.meta.path, {
  parts: { type: "string", default: "history,preload,saving,checksum,working-set" },
  models: { type: "string", default: "bundled,1b" },
  repeats: { type: "string", default: "7" },
  threads: { type: "string", default: "2" },
  turns: { type: "string", default: "100" },
  conversations: { type: "string", default: "4,8,12,16,24,32,40,48,64,96" },
  plots: { type: "string" },
});
const repeats = Number(values.repeats);
const threads = Number(values.threads);
const parts = new Set(values.parts.split(","));

/** Llama 3.2 1B but for its number of layers, which is four here. */
const CONFIG_1B = {
  architectures: ["LlamaForCausalLM"], model_type: "llama", vocab_size: 6144, hidden_size: 2048,
  intermediate_size: 8192, num_hidden_layers: 4, num_attention_heads: 32, num_key_value_heads: 8, head_dim: 64,
  max_position_embeddings: 2048, rms_norm_eps: 1e-5, rope_theta: 10000, tie_word_embeddings: true,
  torch_dtype: "bfloat16",
};
const SIZES = {
  blockTokens: 64, maxModelLen: 2048, gpuBlocks: 256, hostBlocks: 256, diskBlocks: 512, maxBatchTokens: 512, threads,
  cache: { recompute: "never", diskIdleMs: 1e9 },
} as const;

const BUNDLED: HistoryPlan = {
  name: "Kvasir-15M-chat (8 layers)",
  engine: { ...SIZES, model: BUNDLED_MODEL },
  lengths: [256, 512, 1024, 1536, 1792],
  repeats,
};

function plot(name: string, svg: string): void {
  if (values.plots === undefined) return;
  mkdirSync(values.plots, { recursive: true });
  writeFileSync(join(values.plots, `${name}.svg`), svg);
}

const load = (): string => loadavg()[0]!.toFixed(1);
console.log(`${cpus()[0]!.model.trim()}, ${cpus().length} cores, ${threads} threads; load ${load()} before`);
if (parts.has("history")) {
  if (values.models.includes("bundled")) plot("tiers-history", await measureHistories(BUNDLED));
  if (values.models.includes("1b")) {
    using directory = new ModelDirectory({ "config.json": CONFIG_1B });
    const engine = { ...SIZES, model: directory.path, randomWeights: true };
    const name = "random, of the shape of a 1B model with 4 layers";
    const plan = { name, engine, lengths: [256, 512, 1024], repeats: Math.ceil(repeats / 2) };
    plot("tiers-history-1b", await measureHistories(plan));
  }
}
if (parts.has("preload")) await sweepPreload(BUNDLED, 8);
if (parts.has("saving")) await measureSaving({ ...BUNDLED.engine, maxModelLen: 1024, gpuBlocks: 36 }, repeats);
if (parts.has("checksum")) {
  const device = openTinyDevice();
  const memory = device.allocHost(200 * 2 ** 20);
  new Uint8Array(memory.bytes).fill(1);
  measureChecksum(memory, [256 << 10, 1 << 20, 4 << 20, 50 << 20]);
  device.close();
}
if (parts.has("working-set")) {
  const counts = values.conversations.split(",").map(Number);
  plot("tiers-working-set", await sweepWorkingSet(BUNDLED.engine, counts, Number(values.turns)));
}
console.log(`\nload ${load()} after`);
