// The simulator's command line: presets, what each option means, and the run that follows from them.

import { fileURLToPath } from "node:url";
import { describeOptions, OptionError, type OptionSpec, OptionValues } from "../../config/options.ts";
import { POLICY_NAMES, type PolicyName } from "../kvcache/policy.ts";
import type { SimulationConfig } from "./simulation.ts";
import { readTrace, type Session } from "./trace.ts";

const BUNDLED_TRACES: Readonly<Record<string, URL>> = {
  sharegpt: new URL("./traces/sharegpt.tsv.gz", import.meta.url),
  mooncake: new URL("./traces/mooncake-conversation.tsv.gz", import.meta.url),
};

/** `paper`: CachedAttention's main setting, scaled from its 9,000 sessions to the 5,678 of the trace. */
const PRESETS: Readonly<Record<string, Readonly<Record<string, string>>>> = {
  paper: {},
  mooncake: {
    trace: "mooncake",
    rate: "trace",
    "warmup-turns": "2000",
    "kv-bytes-per-token": "131072",
    "host-memory": "128G",
    disk: "2T",
    "context-window": "131072",
    batch: "64",
    "prefill-rate": "31000",
    "pcie-rate": "50",
  },
};

const OPTIONS: readonly OptionSpec[] = [
  { flag: "preset", value: "paper|mooncake", fallback: "paper", help: "where the defaults below come from" },
  {
    flag: "trace", value: "sharegpt|mooncake|FILE", fallback: "sharegpt",
    help: "bundled, or a table as traces/README.md describes",
  },
  {
    flag: "sessions", value: "N", fallback: null,
    help: "sessions to run; default: all of the trace; more: it starts over",
  },
  { flag: "policy", value: "LIST", fallback: POLICY_NAMES.join(","), help: "policies to compare" },
  {
    flag: "rate", value: "SESSIONS/S|trace", fallback: "1",
    help: "Poisson arrivals of sessions; trace: at the times of the trace",
  },
  {
    flag: "load", value: "FACTOR", fallback: null,
    help: "instead of --rate: arrivals at FACTOR times what the service can do when all history hits",
  },
  {
    flag: "think", value: "SECONDS", fallback: "60",
    help: "mean (exponential) pause between an answer and the next turn, where the trace has no times",
  },
  { flag: "warmup-turns", value: "N", fallback: "5910", help: "first turns to be served, not measured" },
  { flag: "batch", value: "N", fallback: "24", help: "turns in service at once" },
  { flag: "prefill-rate", value: "TOKENS/S", fallback: "14000", help: "of the whole GPU" },
  { flag: "decode-rate", value: "TOKENS/S", fallback: "35", help: "of each turn that decodes" },
  {
    flag: "kv-bytes-per-token", value: "BYTES", fallback: "819200",
    help: "for example 819200 for LLaMA-13B, 131072 for Llama-3.1-8B",
  },
  { flag: "block-tokens", value: "N", fallback: "64", help: "tokens of a block" },
  {
    flag: "gpu-memory", value: "SIZE", fallback: "0",
    help: "KV kept on the GPU beside that of running turns",
  },
  { flag: "host-memory", value: "SIZE", fallback: "75.2G", help: "host tier" },
  { flag: "disk", value: "SIZE", fallback: "5876G", help: "disk tier" },
  { flag: "pcie-rate", value: "GB/S", fallback: "26", help: "host to GPU" },
  { flag: "disk-read-rate", value: "GB/S", fallback: "5", help: "disk to host" },
  { flag: "disk-write-rate", value: "GB/S", fallback: "3", help: "host to disk" },
  { flag: "context-window", value: "TOKENS", fallback: "4096", help: "0: endless" },
  {
    flag: "truncation-ratio", value: "SHARE", fallback: "0.5",
    help: "share of the window that is dropped when it overflows",
  },
  { flag: "truncation-keep-blocks", value: "N", fallback: "0", help: "first blocks that are never dropped" },
  {
    flag: "low-watermark", value: "SHARE", fallback: "0.05",
    help: "of host memory: demotion starts when less is free",
  },
  {
    flag: "high-watermark", value: "SHARE", fallback: "0.1",
    help: "of host memory: demotion frees up to this",
  },
  { flag: "ttl", value: "SECONDS", fallback: null, help: "drop what was idle for longer; default: never" },
  { flag: "seed", value: "N", fallback: "1", help: "of arrivals and think times" },
  { flag: "capacity-sweep", value: "LIST", fallback: null, help: "also run with these multiples of --disk" },
  { flag: "load-sweep", value: "LIST", fallback: null, help: "also run at these loads" },
  { flag: "think-sweep", value: "LIST", fallback: null, help: "also run with these think times, seconds" },
  { flag: "json", value: "FILE", fallback: null, help: "write all results there" },
  {
    flag: "svg", value: "DIR", fallback: null,
    help: "draw the sweeps there; without any sweep given: capacity 0.1 to 2, load 0.5 to 3",
  },
  { flag: "help", value: null, fallback: null, help: "print this" },
];

const DEFAULT_CAPACITIES = [0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2];
const DEFAULT_LOADS = [0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3];

/** A run without its policy, so that several can meet the same workload. */
export type RunConfig = Omit<SimulationConfig, "policy">;

export interface SimulatorOptions {
  readonly preset: string;
  readonly traceName: string;
  readonly policies: readonly PolicyName[];
  readonly config: RunConfig;
  readonly sweeps: {
    readonly capacity: readonly number[];
    readonly load: readonly number[];
    readonly thinkSeconds: readonly number[];
  };
  readonly jsonPath: string | null;
  readonly svgDirectory: string | null;
}

/** Null when --help was asked for. Throws OptionError and TraceError. */
export function readSimulatorOptions(argv: readonly string[]): SimulatorOptions | null {
  const preset = new OptionValues(OPTIONS, argv, {}).choice("preset", Object.keys(PRESETS));
  const specs = withPreset(preset);
  const values = new OptionValues(specs, argv, {});
  if (values.isSet("help")) return null;
  const svgDirectory = values.optionalText("svg");
  const given = {
    capacity: numbers(values, "capacity-sweep", 0.001, 1000),
    load: numbers(values, "load-sweep", 0.01, 100),
    thinkSeconds: numbers(values, "think-sweep", 0, 86_400),
  };
  const isAnySweep = Object.values(given).some((list) => list.length > 0);
  const usesDefaults = svgDirectory !== null && !isAnySweep;
  const traceName = values.text("trace");
  return {
    preset,
    traceName,
    policies: readPolicies(values.text("policy")),
    config: readConfig(values, readSessions(traceName)),
    sweeps: usesDefaults ? { ...given, capacity: DEFAULT_CAPACITIES, load: DEFAULT_LOADS } : given,
    jsonPath: values.optionalText("json"),
    svgDirectory,
  };
}

export function simulatorHelp(argv: readonly string[] = []): string {
  const preset = new OptionValues(OPTIONS, argv, {}).choice("preset", Object.keys(PRESETS));
  return [
    "bun run simulate: replays a trace of conversations against the cache policies of the server",
    "",
    describeOptions(withPreset(preset)),
  ].join("\n");
}

/**
 * Service time of the average session, all history cached and the batch full, in seconds of the whole GPU.
 */
export function gpuSecondsPerSession(
  config: Pick<SimulationConfig, "sessions" | "batch" | "prefillRate" | "decodeRate">,
): number {
  const { sessions, batch, prefillRate, decodeRate } = config;
  let seconds = 0;
  for (const turn of sessions.flat()) {
    seconds += turn.newTokens / prefillRate + turn.outputTokens / (decodeRate * batch);
  }
  return seconds / sessions.length;
}

/** Arrivals as a multiple of what the service can do when all history is cached. */
export function loadOf(config: RunConfig): number {
  return sessionsPerSecond(config) * gpuSecondsPerSession(config);
}

/** The same run with arrivals at `load` times what the service can do. */
export function atLoad(config: RunConfig, load: number): RunConfig {
  if (config.sessionRate !== null) return { ...config, sessionRate: load / gpuSecondsPerSession(config) };
  return { ...config, timeScale: (config.timeScale * loadOf(config)) / load };
}

function sessionsPerSecond(config: RunConfig): number {
  if (config.sessionRate !== null) return config.sessionRate;
  const arrivals = config.sessions.map((turns) => turns[0]!.arrivalMs! * config.timeScale);
  const spanMs = Math.max(...arrivals) - Math.min(...arrivals);
  return spanMs === 0 ? Infinity : (1000 * config.sessions.length) / spanMs;
}

function withPreset(preset: string): OptionSpec[] {
  const overrides = PRESETS[preset]!;
  return OPTIONS.map((spec) => {
    const fallback = overrides[spec.flag];
    return fallback === undefined ? spec : Object.assign({}, spec, { fallback });
  });
}

function readConfig(values: OptionValues, sessions: readonly Session[]): RunConfig {
  const blockTokens = values.integer("block-tokens", 1, 65_536);
  const blockBytes = blockTokens * values.number("kv-bytes-per-token", 1, 1e9);
  const blocks = (flag: string) => Math.floor(values.optionalBytes(flag)! / blockBytes);
  const config = {
    sessions,
    sessionCount: values.optionalInteger("sessions", 1, 10_000_000) ?? sessions.length,
    blockTokens,
    blockBytes,
    gpuBlocks: blocks("gpu-memory"),
    hostBlocks: blocks("host-memory"),
    diskBlocks: blocks("disk"),
    pcieRate: values.number("pcie-rate", 0.001, 1e6) * 1e9,
    diskReadRate: values.number("disk-read-rate", 0.001, 1e6) * 1e9,
    diskWriteRate: values.number("disk-write-rate", 0.001, 1e6) * 1e9,
    batch: values.integer("batch", 1, 100_000),
    prefillRate: values.number("prefill-rate", 0.001, 1e9),
    decodeRate: values.number("decode-rate", 0.001, 1e9),
    contextTokens: values.integer("context-window", 0, 1e9),
    truncationRatio: values.number("truncation-ratio", 0.01, 1),
    truncationKeepBlocks: values.integer("truncation-keep-blocks", 0, 1e6),
    lowWatermark: values.number("low-watermark", 0, 1),
    highWatermark: values.number("high-watermark", 0, 1),
    ttlMs: values.optionalText("ttl") === null ? Infinity : values.number("ttl", 0.001, 1e9) * 1000,
    sessionRate: values.text("rate") === "trace" ? null : values.number("rate", 1e-6, 1e6),
    timeScale: 1,
    thinkMs: values.number("think", 0, 1e6) * 1000,
    warmupTurns: values.integer("warmup-turns", 0, 1e9),
    seed: values.integer("seed", 0, 2 ** 31),
  };
  checkTogether(config);
  const isLoadGiven = values.optionalText("load") !== null;
  return isLoadGiven ? atLoad(config, values.number("load", 0.01, 100)) : config;
}

function checkTogether(config: RunConfig): void {
  const { sessions, sessionCount, lowWatermark, highWatermark, warmupTurns, contextTokens } = config;
  if (lowWatermark > highWatermark) {
    throw new OptionError("--low-watermark must not be above --high-watermark");
  }
  let turnCount = 0;
  for (let i = 0; i < sessionCount; i++) turnCount += sessions[i % sessions.length]!.length;
  if (warmupTurns >= turnCount) {
    throw new OptionError(`--warmup-turns (${warmupTurns}) must be below the ${turnCount} turns of the run`);
  }
  if (contextTokens > 0 && contextTokens * config.truncationRatio < config.blockTokens) {
    throw new OptionError("--context-window times --truncation-ratio must be at least a block");
  }
  if (config.sessionRate !== null) return;
  if (sessions.some((turns) => turns[0]!.arrivalMs === null)) {
    throw new OptionError("the trace has no arrival times: give --rate in sessions per second");
  }
  if (sessionCount > sessions.length) {
    throw new OptionError(`the trace has no times for --sessions ${sessionCount}: give --rate too`);
  }
}

function readPolicies(list: string): PolicyName[] {
  return list.split(",").map((name) => {
    const policy = POLICY_NAMES.find((candidate) => candidate === name.trim());
    if (policy === undefined) {
      throw new OptionError(`--policy must name some of ${POLICY_NAMES.join(", ")}, not "${name}"`);
    }
    return policy;
  });
}

function readSessions(trace: string): Session[] {
  const bundled = BUNDLED_TRACES[trace];
  return readTrace(bundled === undefined ? trace : fileURLToPath(bundled));
}

function numbers(values: OptionValues, flag: string, min: number, max: number): number[] {
  const text = values.optionalText(flag);
  if (text === null) return [];
  return text.split(",").map((part) => {
    const value = Number(part);
    if (part.trim() === "" || !(value >= min && value <= max)) {
      throw new OptionError(`--${flag} must be numbers from ${min} to ${max}, like 0.5,1,2, not "${text}"`);
    }
    return value;
  });
}
