// What saving costs: tokens per second and CPU time of the threads with no tier below the gpu, with blocks that move
// down when they must (exclusive), and with everything written through (inclusive); and what a block's checksum costs.

import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { ModelEngineOptions } from "../support/model-engine.ts";
import { cpuLibrary } from "../support/cpu-library.ts";
import { markdownTable, median } from "../support/table.ts";
import { PlacedEngine, randomText } from "./placed-engine.ts";

const PROMPT_TOKENS = 512;
const ANSWER_TOKENS = 64;
const CONVERSATIONS = 6;
const VOCAB = 6000;
/** Of /proc/<pid>/stat. */
const TICKS_PER_SECOND = 100;

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

/** Checksum speed on blocks that lie in memory. */
export function measureChecksum(blockBytes: number, address: number, readBytesPerMs: number | null): void {
  const elapsed: number[] = [];
  for (let i = 0; i < 200; i++) {
    const beginMs = performance.now();
    cpuLibrary.checksum(address as never, blockBytes);
    elapsed.push(performance.now() - beginMs);
  }
  const ms = median(elapsed);
  const rate = blockBytes / ms / 1e6;
  const read = readBytesPerMs === null ? "" : `; a read from disk takes ${(blockBytes / readBytesPerMs).toFixed(3)} ms`;
  console.log(`\nchecksum of a block of ${blockBytes} bytes: ${ms.toFixed(4)} ms, ${rate.toFixed(1)} GB/s${read}`);
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
    const stat = readFileSync(`/proc/self/task/${task}/stat`, "utf8");
    const name = /\((.*)\)/s.exec(stat)![1]!;
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    const ticks = Number(fields[11]) + Number(fields[12]);
    times.set(name, (times.get(name) ?? 0) + (ticks * 1000) / TICKS_PER_SECOND);
  }
  return times;
}
