// The CPU library against what the machine can do: prefill in GFLOP/s beside the measured peak of multiply-adds, decode
// in GB/s of weights beside the measured read bandwidth, both measured between the rounds, for the bundled model and
// for a random one of a billion parameters.
//
//   bun run test/bench/cpu.ts [--threads 2] [--rounds 5] [--models bundled,1b] [--isa best]

import { mkdtempSync, rmSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import type { Isa } from "../../sidecar/native.ts";
import { ModelDirectory } from "../support/model-directory.ts";
import { BUNDLED_MODEL } from "../support/recall.ts";
import { BenchModel } from "./cpu-model.ts";

const { values } = parseArgs({
  options: {
    threads: { type: "string", default: String(cpus().length) },
    rounds: { type: "string", default: "5" },
    models: { type: "string", default: "bundled,1b" },
    isa: { type: "string", default: "best" },
  },
});
const threads = Number(values.threads);
const rounds = Number(values.rounds);

/** About the shape of Llama 3.2 1B, with a small vocabulary. */
const CONFIG_1B = {
  model_type: "llama", vocab_size: 32000, hidden_size: 2048, intermediate_size: 8192, num_hidden_layers: 16,
  num_attention_heads: 32, num_key_value_heads: 8, head_dim: 64, max_position_embeddings: 2112,
  rms_norm_eps: 1e-5, rope_theta: 10000, tie_word_embeddings: true, torch_dtype: "bfloat16",
};

interface Hardware {
  readonly gflops: number;
  readonly readGBps: Readonly<Record<string, number>>;
}

/** Builds the probe; each call measures again. */
class HardwareProbe {
  readonly #directory = mkdtempSync(join(tmpdir(), "kvasir-bench-"));
  readonly #program = join(this.#directory, "cpu-hardware");

  constructor() {
    const source = join(import.meta.dir, "cpu-hardware.cpp");
    const flags = ["-std=gnu++20", "-O3", "-march=native", "-ffp-contract=fast", "-pthread"];
    const { success, stderr } = Bun.spawnSync(["g++", ...flags, "-o", this.#program, source]);
    if (!success) throw new Error(stderr.toString());
  }

  measure(mebibytes: number): { gflops: number; readGBps: number } {
    const { stdout } = Bun.spawnSync([this.#program, String(threads), String(mebibytes)]);
    const hardware = JSON.parse(stdout.toString()) as Hardware;
    return { gflops: hardware.gflops, readGBps: hardware.readGBps[mebibytes]! };
  }

  [Symbol.dispose](): void {
    rmSync(this.#directory, { recursive: true });
  }
}

interface Plan {
  readonly name: string;
  readonly directory: string;
  readonly randomWeights: boolean;
  readonly prompts: readonly number[];
  readonly contexts: readonly number[];
  readonly steps: number;
}

const median = (numbers: readonly number[]): number =>
  numbers.toSorted((a, b) => a - b)[Math.floor(numbers.length / 2)]!;
const percent = (part: number, whole: number): string => `${((100 * part) / whole).toFixed(0)} %`;

async function measure(plan: Plan, probe: HardwareProbe): Promise<void> {
  const sequences = 8;
  const maxRows = Math.max(...plan.prompts);
  using model = await BenchModel.load({ ...plan, threads, isa: values.isa as Isa, maxRows, sequences });
  const { layers, output } = model.matrixParameters;
  const weightBytes = 2 * (layers + output);
  const times = new Map<string, number[]>();
  const note = (key: string, ms: readonly number[]): void => {
    times.set(key, [...(times.get(key) ?? []), ...ms]);
  };
  let gflops = 0;
  let readGBps = 0;
  model.prefill(Math.min(...plan.prompts));
  for (let round = 0; round < rounds; round++) {
    const hardware = probe.measure(Math.round(weightBytes / 2 ** 20));
    gflops = Math.max(gflops, hardware.gflops);
    readGBps = Math.max(readGBps, hardware.readGBps);
    for (const count of plan.prompts) note(`prefill ${count}`, [model.prefill(count)]);
    for (const context of plan.contexts) {
      for (let i = 0; i < 4; i++) {
        note(`decode ${context}`, [model.decode(context, plan.steps)]);
        note(`decode ${context} x${sequences}`, [model.decode(context, plan.steps, sequences)]);
      }
    }
  }
  const info = model.model.device.info();
  console.log(`\n${plan.name}: ${((layers + output) / 1e6).toFixed(1)}M weights, ${info["isa"]}, ${threads} threads`);
  const mebibytes = (weightBytes / 2 ** 20).toFixed(0);
  console.log(`${info["name"]}: ${gflops} GFLOP/s, reads ${readGBps} GB/s of ${mebibytes} MiB`);
  console.log("| what | tokens/s, best | median | GFLOP/s, best | of peak | weights GB/s, best | of bandwidth |");
  console.log("| --- | --- | --- | --- | --- | --- | --- |");
  for (const [key, ms] of times) {
    const [kind, size, batch] = key.split(" ") as [string, string, string | undefined];
    const best = Math.min(...ms) / 1000;
    const tokens = kind === "prefill" ? Number(size) : batch === undefined ? 1 : sequences;
    const speeds = `${(tokens / best).toFixed(0)} | ${(tokens / (median(ms) / 1000)).toFixed(0)}`;
    const flops = model.prefillFlops(Number(size)) / best / 1e9;
    const rate = weightBytes / best / 1e9;
    console.log(
      kind === "prefill"
        ? `| ${key} | ${speeds} | ${flops.toFixed(0)} | ${percent(flops, gflops)} | | |`
        : `| ${key} | ${speeds} | | | ${rate.toFixed(1)} | ${percent(rate, readGBps)} |`,
    );
  }
}

using probe = new HardwareProbe();
for (const name of values.models.split(",")) {
  if (name === "bundled") {
    const directory = BUNDLED_MODEL;
    const prompts = [128, 512, 2048];
    await measure({ name, directory, randomWeights: false, prompts, contexts: [64, 1500], steps: 16 }, probe);
  } else {
    using directory = new ModelDirectory({ "config.json": CONFIG_1B });
    const plan = { name, directory: directory.path, randomWeights: true, prompts: [128, 512], contexts: [64, 1500] };
    await measure({ ...plan, steps: 4 }, probe);
  }
}
