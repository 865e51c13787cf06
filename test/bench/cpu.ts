// The CPU library against what the machine can do: prefill in GFLOP/s beside the measured peak of multiply-adds, decode
// in GB/s of weights beside the measured read bandwidth, for the bundled model and for a random one of a billion
// parameters. Everything is measured once a round, in turns, and compared within the round: the memory of a machine
// that is shared may be twice as fast a minute later.
//
//   bun run test/bench/cpu.ts [--threads 2] [--rounds 5] [--models bundled,1b] [--isa best]
//     [--llamacpp DIR]: llama.cpp in turns with it, see llamacpp.ts

import { mkdtempSync, rmSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import type { Isa } from "../../sidecar/native.ts";
import { ModelDirectory } from "../support/model-directory.ts";
import { BUNDLED_MODEL } from "../support/recall.ts";
import { benchOptions } from "./bench-options.ts";
import { BenchModel } from "./cpu-model.ts";
import { LlamaCpp } from "./llamacpp.ts";

const values = benchOptions(import.meta.path, {
  threads: { type: "string", default: String(cpus().length) },
  rounds: { type: "string", default: "5" },
  models: { type: "string", default: "bundled,1b" },
  isa: { type: "string", default: "best" },
  llamacpp: { type: "string" },
});
const threads = Number(values.threads);
const rounds = Number(values.rounds);

/** About the shape of Llama 3.2 1B, with a small vocabulary. */
const CONFIG_1B = {
  architectures: ["LlamaForCausalLM"], model_type: "llama", vocab_size: 32000, hidden_size: 2048,
  intermediate_size: 8192, num_hidden_layers: 16, num_attention_heads: 32, num_key_value_heads: 8, head_dim: 64,
  max_position_embeddings: 2112, rms_norm_eps: 1e-5, rope_theta: 10000, tie_word_embeddings: true,
  torch_dtype: "bfloat16",
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
  /** Decode steps of one measurement. */
  readonly steps: number;
}

/** Best milliseconds of each round for a prompt or a decode step, by "prefill:512", "decode:64", "decode:64 x8". */
type Times = Map<string, number[]>;

const SEQUENCES = 8;
const REPEATS = 4;
const percent = (part: number): string => `${(100 * part).toFixed(0)} %`;
const median = (values: readonly number[]): number => values.toSorted((a, b) => a - b)[values.length >> 1]!;

function note(times: Times, key: string, ms: readonly number[]): void {
  times.set(key, [...(times.get(key) ?? []), Math.min(...ms)]);
}

function runRound(model: BenchModel, plan: Plan, times: Times): void {
  const repeated = (run: () => number): number[] => Array.from({ length: REPEATS }, run);
  for (const count of plan.prompts) note(times, `prefill:${count}`, repeated(() => model.prefill(count)));
  for (const context of plan.contexts) {
    const decode = (sequences: number) => repeated(() => model.decode(context, plan.steps, sequences));
    note(times, `decode:${context}`, decode(1));
    note(times, `decode:${context} x${SEQUENCES}`, decode(SEQUENCES));
  }
}

async function measure(plan: Plan, probe: HardwareProbe, llamaCpp: LlamaCpp | null): Promise<void> {
  llamaCpp?.prepare(plan.directory, plan.randomWeights);
  const maxRows = Math.max(...plan.prompts);
  using model = await BenchModel.load({ ...plan, threads, isa: values.isa as Isa, maxRows, sequences: SEQUENCES });
  const { layers, output } = model.matrixParameters;
  const weightBytes = 2 * (layers + output);
  const [ours, theirs]: [Times, Times] = [new Map(), new Map()];
  const hardware: { gflops: number; readGBps: number }[] = [];
  const work = [
    ...plan.prompts.filter((count) => count <= 512).map((count) => `prefill:${count}`),
    ...plan.contexts.map((context) => `decode:${context}`),
  ];
  model.prefill(Math.min(...plan.prompts));
  for (let round = 0; round < rounds; round++) {
    console.error(`${plan.name}: round ${round + 1} of ${rounds}`);
    hardware.push(probe.measure(Math.round(weightBytes / 2 ** 20)));
    runRound(model, plan, ours);
    if (llamaCpp === null) continue;
    const measured = llamaCpp.measure(work, threads, REPEATS, plan.steps);
    for (const [key, ms] of Object.entries(measured)) note(theirs, key, ms);
  }
  const info = model.model.device.info();
  const mebibytes = (weightBytes / 2 ** 20).toFixed(0);
  const millions = ((layers + output) / 1e6).toFixed(1);
  console.log(`\n${plan.name}: ${millions}M weights in bf16, ${info["isa"]}, ${threads} threads`);
  const range = (values: readonly number[]): string => `${Math.min(...values)} to ${Math.max(...values)}`;
  const [gflops, readGBps] = [hardware.map((one) => one.gflops), hardware.map((one) => one.readGBps)];
  console.log(`${info["name"]}: ${range(gflops)} GFLOP/s, reads ${range(readGBps)} GB/s of ${mebibytes} MiB\n`);
  printTable(model, weightBytes, hardware, ours, theirs);
}

function printTable(
  model: BenchModel,
  weightBytes: number,
  hardware: readonly { gflops: number; readGBps: number }[],
  ours: Times,
  theirs: Times,
): void {
  console.log("| what | tokens/s | rate | of the machine's | llama.cpp, tokens/s | ours to it |");
  console.log("| --- | ---: | ---: | ---: | ---: | ---: |");
  for (const [key, rounds] of ours) {
    const [kind, size, batch] = key.split(/[: ]/) as [string, string, string | undefined];
    const tokens = kind === "prefill" ? Number(size) : batch === undefined ? 1 : SEQUENCES;
    const speed = (ms: number): string => ((1000 * tokens) / ms).toFixed(tokens / ms < 0.1 ? 1 : 0);
    const work = kind === "prefill" ? model.prefillFlops(Number(size)) : weightBytes;
    const rates = rounds.map((ms) => work / ms / 1e6);
    const peaks = hardware.map((one) => (kind === "prefill" ? one.gflops : one.readGBps));
    const rate = `${median(rates).toFixed(0)} ${kind === "prefill" ? "GFLOP/s" : "GB/s of weights"}`;
    const share = percent(median(rates.map((rate, round) => rate / peaks[round]!)));
    const other = theirs.get(key);
    const beside =
      other === undefined
        ? " | "
        : `${speed(median(other))} | ${median(other.map((ms, round) => ms / rounds[round]!)).toFixed(2)}`;
    console.log(`| ${key.replace(":", " ")} | ${speed(median(rounds))} | ${rate} | ${share} | ${beside} |`);
  }
}

using probe = new HardwareProbe();
using llamaCpp = values.llamacpp === undefined ? null : new LlamaCpp(values.llamacpp);
for (const name of values.models.split(",")) {
  if (name === "bundled") {
    const prompts = [128, 512, 2048];
    const plan = { name, directory: BUNDLED_MODEL, randomWeights: false, prompts, contexts: [64, 1500], steps: 16 };
    await measure(plan, probe, llamaCpp);
  } else {
    using directory = new ModelDirectory({ "config.json": CONFIG_1B });
    const plan = { name, directory: directory.path, randomWeights: true, prompts: [128, 512], contexts: [64, 1500] };
    await measure({ ...plan, steps: 4 }, probe, llamaCpp);
  }
}
