// The sidecar's configuration: one frozen object, read once from flags and environment.

import { homedir } from "node:os";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { describeOptions, OptionError, type OptionSpec, OptionValues } from "../config/options.ts";

const BUNDLED_MODEL = fileURLToPath(new URL("./models/kvasir-15m-chat", import.meta.url));

export const SIDECAR_OPTIONS: readonly OptionSpec[] = [
  { flag: "model", value: "DIR|ORG/NAME", fallback: null, env: "KVASIR_MODEL", help: "Hugging Face directory, or a model of the hub to download; without it, the bundled Kvasir-15M-chat" },
  { flag: "model-id", value: "NAME", fallback: null, help: "name under which the API serves the model; default: its directory's name" },
  { flag: "random-weights", value: null, fallback: null, help: "take only config.json of --model and make up the weights (for speed tests)" },
  { flag: "backend", value: "auto|cpu|cuda", fallback: "auto", env: "KVASIR_BACKEND", help: "compute library; auto: cuda where a GPU and nvcc are, else cpu" },
  { flag: "gpu-index", value: "N", fallback: "0", help: "GPU to use" },
  { flag: "threads", value: "N", fallback: "0", help: "CPU compute threads; 0: one less than the cores" },
  { flag: "kv-dtype", value: "auto|f32|bf16|f16", fallback: "auto", help: "number format of the KV cache; auto: that of the weights" },
  { flag: "compute-dtype", value: "auto|f32|bf16|f16", fallback: "auto", help: "number format of activations on the GPU (the CPU computes in f32)" },
  { flag: "max-model-len", value: "TOKENS", fallback: null, help: "longest prompt + answer; default: what the model was made for" },
  { flag: "max-num-seqs", value: "N", fallback: "32", help: "sequences that run at once" },
  { flag: "max-batch-tokens", value: "N", fallback: "512", help: "tokens computed in one step; longer prompts are cut in chunks" },
  { flag: "max-waiting", value: "N", fallback: "256", help: "sequences that may wait; more are refused with 429" },
  { flag: "block-tokens", value: "N", fallback: "64", help: "tokens of a KV block: 8, 16, 32, 64, 128 or 256" },
  { flag: "gpu-blocks", value: "N", fallback: null, help: "KV blocks in the compute device's memory; default: from --gpu-memory" },
  { flag: "gpu-memory", value: "SIZE", fallback: null, help: "KV memory on the compute device, such as 512M or 40G; default: from what is free" },
  { flag: "gpu-memory-utilization", value: "SHARE", fallback: "0.9", help: "share of the GPU's memory for weights, workspace and KV together" },
  { flag: "host", value: "ADDRESS", fallback: "127.0.0.1", help: "address to listen on" },
  { flag: "port", value: "N", fallback: "8786", env: "KVASIR_SIDECAR_PORT", help: "port to listen on; 0: any free one" },
  { flag: "data", value: "DIR", fallback: join(homedir(), ".kvasir"), env: "KVASIR_DATA", help: "where lineage, caches and secrets live" },
  { flag: "name", value: "NAME", fallback: "sidecar-1", help: "name of this sidecar in the database and the logs" },
  { flag: "drain-timeout", value: "SECONDS", fallback: "30", help: "how long a stop waits for answers in progress" },
  { flag: "help", value: null, fallback: null, help: "print this" },
];

export interface SidecarConfig {
  readonly model: string;
  readonly modelId: string | null;
  readonly randomWeights: boolean;
  readonly backend: "auto" | "cpu" | "cuda";
  readonly gpuIndex: number;
  readonly threads: number;
  readonly kvDtype: "auto" | "f32" | "bf16" | "f16";
  readonly computeDtype: "auto" | "f32" | "bf16" | "f16";
  readonly maxModelLen: number | null;
  readonly maxNumSeqs: number;
  readonly maxBatchTokens: number;
  readonly maxWaiting: number;
  readonly blockTokens: number;
  readonly gpuBlocks: number | null;
  readonly gpuMemoryBytes: number | null;
  readonly gpuMemoryUtilization: number;
  readonly host: string;
  readonly port: number;
  readonly dataDirectory: string;
  readonly name: string;
  readonly drainTimeoutMs: number;
  /** Null: made at start and written to the data directory. */
  readonly secret: string | null;
}

const DTYPES = ["auto", "f32", "bf16", "f16"] as const;

/** Throws OptionError. Null when --help was asked for. */
export function readSidecarConfig(
  argv: readonly string[],
  env: Readonly<Record<string, string | undefined>>,
): SidecarConfig | null {
  const values = new OptionValues(SIDECAR_OPTIONS, argv, env);
  if (values.isSet("help")) return null;
  const config: SidecarConfig = {
    model: values.optionalText("model") ?? BUNDLED_MODEL,
    modelId: values.optionalText("model-id"),
    randomWeights: values.isSet("random-weights"),
    backend: values.choice("backend", ["auto", "cpu", "cuda"]),
    gpuIndex: values.integer("gpu-index", 0, 63),
    threads: values.integer("threads", 0, 1024),
    kvDtype: values.choice("kv-dtype", DTYPES),
    computeDtype: values.choice("compute-dtype", DTYPES),
    maxModelLen: values.optionalInteger("max-model-len", 16, 2 ** 24),
    maxNumSeqs: values.integer("max-num-seqs", 1, 4096),
    maxBatchTokens: values.integer("max-batch-tokens", 1, 65536),
    maxWaiting: values.integer("max-waiting", 1, 65536),
    blockTokens: values.integer("block-tokens", 8, 256),
    gpuBlocks: values.optionalInteger("gpu-blocks", 2, 2 ** 30),
    gpuMemoryBytes: values.optionalBytes("gpu-memory"),
    gpuMemoryUtilization: values.number("gpu-memory-utilization", 0.05, 0.99),
    host: values.text("host"),
    port: values.integer("port", 0, 65535),
    dataDirectory: resolve(values.text("data")),
    name: values.text("name"),
    drainTimeoutMs: values.number("drain-timeout", 0, 3600) * 1000,
    secret: env["KVASIR_SIDECAR_SECRET"] || null,
  };
  checkTogether(config);
  return Object.freeze(config);
}

export function sidecarHelp(): string {
  return `bun run sidecar: serves one model to edges\n\n${describeOptions(SIDECAR_OPTIONS)}`;
}

function checkTogether(config: SidecarConfig): void {
  const { blockTokens, maxBatchTokens, maxNumSeqs } = config;
  if ((blockTokens & (blockTokens - 1)) !== 0) {
    throw new OptionError(`--block-tokens must be a power of two, not ${blockTokens}`);
  }
  if (maxBatchTokens < maxNumSeqs) {
    throw new OptionError(
      `--max-batch-tokens (${maxBatchTokens}) must be at least --max-num-seqs (${maxNumSeqs}): each running sequence needs a row`,
    );
  }
}
