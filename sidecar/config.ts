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
  { flag: "quantization", value: "none|fp8", fallback: "none", help: "fp8: keep the layers' matrices in 8 bits (E4M3, a scale a row), and round prompts' activations likewise; GPUs of compute capability 8.9 or newer" },
  { flag: "max-model-len", value: "TOKENS", fallback: null, help: "longest prompt + answer; default: what the model was made for" },
  { flag: "max-num-seqs", value: "N", fallback: "32", help: "sequences that run at once" },
  { flag: "max-batch-tokens", value: "N", fallback: "512", help: "tokens computed in one step; longer prompts are cut in chunks" },
  { flag: "max-waiting", value: "N", fallback: "256", help: "sequences that may wait; more are refused with 429" },
  { flag: "block-tokens", value: "N", fallback: "64", help: "tokens of a KV block: 8, 16, 32, 64, 128 or 256" },
  { flag: "gpu-blocks", value: "N", fallback: null, help: "KV blocks in the compute device's memory; default: from --gpu-memory" },
  { flag: "gpu-memory", value: "SIZE", fallback: null, help: "KV memory on the compute device, such as 512M or 40G; default: from what is free" },
  { flag: "gpu-memory-utilization", value: "SHARE", fallback: "0.9", help: "share of the GPU's memory for weights, workspace and KV together" },
  { flag: "host-memory", value: "SIZE", fallback: null, help: "host tier of the KV cache, such as 2G; 0: none, and no disk tier; default: a share of what is free" },
  { flag: "disk", value: "SIZE", fallback: null, help: "disk tier of the KV cache, allocated at once; 0: none; default: a share of what is free" },
  { flag: "disk-path", value: "FILE", fallback: null, help: "file of the disk tier; its folder is made, but none above it; default: kv-cache/blocks in the data directory" },
  { flag: "disk-admission", value: "idle|eviction|second-touch", fallback: "idle", help: "what goes to disk before it has to leave host memory: what is idle, nothing, or what was used twice (and then nothing else)" },
  { flag: "disk-idle", value: "SECONDS", fallback: "1", help: "time without use after which --disk-admission idle writes a block" },
  { flag: "io-threads", value: "N", fallback: "8", help: "requests that the disk tier has in flight" },
  { flag: "tiers", value: "auto|inclusive|exclusive", fallback: "auto", help: "whether a block in gpu memory also has a copy in host memory; auto: yes on a GPU, no where both are the same memory" },
  { flag: "keep-host-cache", value: null, fallback: null, help: "leave the host tier in shared memory at an orderly stop, for the next start" },
  { flag: "cache-policy", value: "scheduler-aware|lru|fifo", fallback: "scheduler-aware", help: "which blocks leave a tier first" },
  { flag: "cache-ttl", value: "SECONDS", fallback: null, help: "idle time after which blocks are dropped, unless a request says otherwise; default: never" },
  { flag: "recompute", value: "auto|never", fallback: "auto", help: "compute cached tokens anew where that is faster than loading them" },
  { flag: "preload-layers", value: "N", fallback: null, help: "layers that must have been loaded before a sequence joins a step; default: as many as hide the rest" },
  { flag: "max-load-stall", value: "MS", fallback: "1", help: "how long a step may wait for layers that are still being loaded" },
  { flag: "load-ahead-blocks", value: "N", fallback: null, help: "gpu blocks that waiting sequences may load into; default: a quarter of all" },
  { flag: "truncation-keep-blocks", value: "N", fallback: "1", help: "blocks at the start of a conversation that stay when the context window is full" },
  { flag: "truncation-ratio", value: "SHARE", fallback: "0.5", help: "share of the context window that leaves when it is full" },
  { flag: "host", value: "ADDRESS", fallback: "127.0.0.1", help: "address to listen on" },
  { flag: "port", value: "N", fallback: "8786", env: "KVASIR_SIDECAR_PORT", help: "port to listen on; 0: any free one" },
  { flag: "data", value: "DIR", fallback: join(homedir(), ".kvasir"), env: "KVASIR_DATA", help: "where lineage, caches and secrets live" },
  { flag: "name", value: "NAME", fallback: "sidecar-1", help: "name of this sidecar in the database and the logs" },
  { flag: "drain-timeout", value: "SECONDS", fallback: "30", help: "how long a stop waits for answers in progress" },
  { flag: "help", value: null, fallback: null, help: "print this" },
];

/** The KV cache's tiers and how they are used. */
export interface CacheConfig {
  /** Null: sized from what is free. */
  readonly hostBytes: number | null;
  readonly diskBytes: number | null;
  readonly diskPath: string;
  readonly diskAdmission: (typeof DISK_ADMISSIONS)[number];
  readonly diskIdleMs: number;
  readonly ioThreads: number;
  readonly tiers: (typeof TIER_MODES)[number];
  readonly keepHostCache: boolean;
  readonly policy: (typeof CACHE_POLICIES)[number];
  /** Null: never dropped for being idle. */
  readonly ttlMs: number | null;
  readonly recompute: (typeof RECOMPUTE_MODES)[number];
  readonly preloadLayers: number | null;
  readonly maxLoadStallMs: number;
  readonly loadAheadBlocks: number | null;
  readonly keepBlocks: number;
  readonly truncationRatio: number;
}

export interface SidecarConfig {
  readonly model: string;
  readonly modelId: string | null;
  readonly randomWeights: boolean;
  readonly backend: "auto" | "cpu" | "cuda";
  readonly gpuIndex: number;
  readonly threads: number;
  readonly kvDtype: "auto" | "f32" | "bf16" | "f16";
  readonly computeDtype: "auto" | "f32" | "bf16" | "f16";
  readonly quantization: (typeof QUANTIZATIONS)[number];
  readonly maxModelLen: number | null;
  readonly maxNumSeqs: number;
  readonly maxBatchTokens: number;
  readonly maxWaiting: number;
  readonly blockTokens: number;
  readonly gpuBlocks: number | null;
  readonly gpuMemoryBytes: number | null;
  readonly gpuMemoryUtilization: number;
  readonly cache: CacheConfig;
  readonly host: string;
  readonly port: number;
  readonly dataDirectory: string;
  readonly name: string;
  readonly drainTimeoutMs: number;
  /** Null: made at start and written to the data directory. */
  readonly secret: string | null;
}

const BLOCK_TOKENS = ["8", "16", "32", "64", "128", "256"] as const;
const DTYPES = ["auto", "f32", "bf16", "f16"] as const;
const QUANTIZATIONS = ["none", "fp8"] as const;
const DISK_ADMISSIONS = ["idle", "eviction", "second-touch"] as const;
const TIER_MODES = ["auto", "inclusive", "exclusive"] as const;
const CACHE_POLICIES = ["scheduler-aware", "lru", "fifo"] as const;
const RECOMPUTE_MODES = ["auto", "never"] as const;

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
    quantization: values.choice("quantization", QUANTIZATIONS),
    maxModelLen: values.optionalInteger("max-model-len", 16, 2 ** 24),
    maxNumSeqs: values.integer("max-num-seqs", 1, 4096),
    maxBatchTokens: values.integer("max-batch-tokens", 1, 65536),
    maxWaiting: values.integer("max-waiting", 1, 65536),
    blockTokens: Number(values.choice("block-tokens", BLOCK_TOKENS)),
    gpuBlocks: values.optionalInteger("gpu-blocks", 2, 2 ** 30),
    gpuMemoryBytes: values.optionalBytes("gpu-memory"),
    gpuMemoryUtilization: values.number("gpu-memory-utilization", 0.05, 0.99),
    cache: readCacheConfig(values),
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

function readCacheConfig(values: OptionValues): CacheConfig {
  const ttlS = values.optionalInteger("cache-ttl", 1, 2 ** 31);
  return Object.freeze({
    hostBytes: values.optionalBytes("host-memory"),
    diskBytes: values.optionalBytes("disk"),
    diskPath: resolve(values.optionalText("disk-path") ?? join(values.text("data"), "kv-cache", "blocks")),
    diskAdmission: values.choice("disk-admission", DISK_ADMISSIONS),
    diskIdleMs: values.number("disk-idle", 0, 86_400) * 1000,
    ioThreads: values.integer("io-threads", 1, 64),
    tiers: values.choice("tiers", TIER_MODES),
    keepHostCache: values.isSet("keep-host-cache"),
    policy: values.choice("cache-policy", CACHE_POLICIES),
    ttlMs: ttlS === null ? null : ttlS * 1000,
    recompute: values.choice("recompute", RECOMPUTE_MODES),
    preloadLayers: values.optionalInteger("preload-layers", 0, 4096),
    maxLoadStallMs: values.number("max-load-stall", 0, 60_000),
    loadAheadBlocks: values.optionalInteger("load-ahead-blocks", 0, 2 ** 30),
    keepBlocks: values.integer("truncation-keep-blocks", 0, 2 ** 20),
    truncationRatio: values.number("truncation-ratio", 0.01, 0.99),
  });
}

export function sidecarHelp(): string {
  return `bun run sidecar: serves one model to edges\n\n${describeOptions(SIDECAR_OPTIONS)}`;
}

function checkTogether(config: SidecarConfig): void {
  const { maxBatchTokens, maxNumSeqs } = config;
  if (maxBatchTokens < maxNumSeqs) {
    throw new OptionError(
      `--max-batch-tokens (${maxBatchTokens}) must be at least --max-num-seqs (${maxNumSeqs}): ` +
        "each running sequence needs a row",
    );
  }
}
