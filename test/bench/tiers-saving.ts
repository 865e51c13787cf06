// What saving costs: tokens per second and CPU time of the threads with no tier below the gpu, with blocks that move
// down when they must (exclusive), and with everything written through (inclusive); and what a block's checksum costs.

import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { HostAddress, HostBuffer } from "../../sidecar/native.ts";
import type { ModelEngineOptions } from "../support/model-engine.ts";
import { cpuLibrary } from "../support/cpu-library.ts";
import { markdownTable, median } from "../support/table.ts";
import { PlacedEngine, randomText } from "./placed-engine.ts";

const PROMPT_TOKENS = 512;
const ANSWER_TOKENS = 64;
const CONVERSATIONS = 6;
const PASSES = 7;
const VOCAB = 6000;

const MODES = {
  "no tier below": { hostBlocks: 0, diskBlocks: 0 },
  exclusive: { cache: { tiers: "exclusive", recompute: "never", diskIdleMs: 1e9 } },
  inclusive: { cache: { tiers: "inclusive", recompute: "never", diskIdleMs: 1e9 } },
} as const;

interface Sample {
  readonly tokensPerS: number;
  readonly computeCpuMs: number;
  readonly saveCpuMs: number;
  readonly savedMiB: number;
}

export async function measureSaving(engine: Omit<ModelEngineOptions, "data">, repeats: number): Promise<void> {
  const samples = new Map<string, Sample[]>();
  for (let repeat = 0; repeat < repeats; repeat++) {
    const modes = Object.entries(MODES);
    for (let i = 0; i < modes.length; i++) {
      const [name, changes] = modes[(i + repeat) % modes.length]!;
      const sample = await runOnce({ ...engine, ...(changes as Partial<ModelEngineOptions>) }, repeat);
      samples.set(name, [...(samples.get(name) ?? []), sample]);
    }
  }
  console.log(
    `\nsaving: ${CONVERSATIONS} conversations of ${PROMPT_TOKENS} + ${ANSWER_TOKENS} tokens, four at once; ` +
      `medians of ${repeats}; CPU in ms per 1,000 tokens`,
  );
  const rows = [...samples].map(([name, each]) => {
    const of = (key: keyof Sample) => median(each.map((sample) => sample[key]));
    return [name, of("tokensPerS"), of("computeCpuMs"), of("saveCpuMs"), of("savedMiB")];
  });
  console.log(markdownTable([["tiers", "tokens/s", "CPU of compute", "CPU of the save thread", "MiB saved"], ...rows]));
}

/** Milliseconds of a block's checksum beside a copy, for blocks that lie one behind the other in memory. */
export function measureChecksum(memory: HostBuffer, blockBytes: readonly number[]): void {
  const target = new Uint8Array(Math.max(...blockBytes));
  const rows = blockBytes.map((bytes) => {
    const offsets = Array.from({ length: Math.floor(memory.bytes.byteLength / bytes) }, (_, i) => i * bytes);
    const sum = fastestMs(offsets, (offset) => cpuLibrary.checksum((memory.address + offset) as HostAddress, bytes));
    const copy = fastestMs(offsets, (offset) => target.set(new Uint8Array(memory.bytes, offset, bytes)));
    return [`${bytes / 1024} KiB`, sum.toFixed(3), (bytes / sum / 1e6).toFixed(1), (bytes / copy / 1e6).toFixed(1)];
  });
  console.log(`\nchecksums, best of ${PASSES} passes over ${memory.bytes.byteLength / 2 ** 20} MiB, one thread`);
  console.log(markdownTable([["block", "checksum, ms", "GB/s", "a copy, GB/s"], ...rows]));
}

/** Of one block, in the fastest pass over all of them. */
function fastestMs(offsets: readonly number[], work: (offset: number) => unknown): number {
  const passes = Array.from({ length: PASSES }, () => {
    const beginMs = performance.now();
    for (const offset of offsets) work(offset);
    return (performance.now() - beginMs) / offsets.length;
  });
  return Math.min(...passes);
}

async function runOnce(options: Omit<ModelEngineOptions, "data">, repeat: number): Promise<Sample> {
  const data = mkdtempSync(join(tmpdir(), "kvasir-bench-"));
  const placed = await PlacedEngine.open({ ...options, data });
  const { engine } = placed;
  const before = threadCpuMs();
  const beginMs = performance.now();
  for (let i = 0; i < CONVERSATIONS; i++) {
    engine.submit(randomText(PROMPT_TOKENS, repeat * 100 + i, VOCAB), { maxTokens: ANSWER_TOKENS });
  }
  engine.runToEnd();
  const elapsedMs = performance.now() - beginMs;
  while (engine.cache.moves.inFlight > 0) engine.turn();
  const after = threadCpuMs();
  const tokens = CONVERSATIONS * (PROMPT_TOKENS + ANSWER_TOKENS);
  const { savedBlocks } = engine.cache.residency.counters;
  const spent = (name: string) => (((after.get(name) ?? 0) - (before.get(name) ?? 0)) * 1000) / tokens;
  const sample = {
    tokensPerS: (tokens / elapsedMs) * 1000,
    computeCpuMs: spent("kvs-compute"),
    saveCpuMs: spent("kvs-save"),
    savedMiB: (savedBlocks * engine.cache.options.blockBytes) / 2 ** 20,
  };
  engine.close();
  rmSync(data, { recursive: true });
  return sample;
}

/** CPU time of this process's threads, user and system, by thread name. */
function threadCpuMs(): Map<string, number> {
  const times = new Map<string, number>();
  for (const task of readdirSync("/proc/self/task")) {
    const name = readFileSync(`/proc/self/task/${task}/comm`, "utf8").trim();
    const [ranNs] = readFileSync(`/proc/self/task/${task}/schedstat`, "utf8").split(" ");
    times.set(name, (times.get(name) ?? 0) + Number(ranNs) / 1e6);
  }
  return times;
}
