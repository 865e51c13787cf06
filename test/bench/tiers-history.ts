// Time to the first token against the length of the history, by where the history's KV lies; and the sweep of how many
// layers must have come before a step may start.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Line, linePlot } from "../../sidecar/simulate/line-plot.ts";
import type { ModelEngineOptions } from "../support/model-engine.ts";
import { markdownTable, median } from "../support/table.ts";
import { type Place, PlacedEngine, randomText } from "./placed-engine.ts";

/** The median new message of real chats. */
const NEW_TOKENS = 30;
const VOCAB = 6000;
const COLORS = ["#555", "#0a7", "#06c", "#c60", "#a2a"];

export interface HistoryPlan {
  readonly name: string;
  readonly engine: Omit<ModelEngineOptions, "data">;
  readonly lengths: readonly number[];
  readonly repeats: number;
}

const SOURCES = ["recompute", "gpu", "host", "disk", "cold restart"] as const;
type Source = (typeof SOURCES)[number];

/** ms by source and length. */
type Times = Map<string, number[]>;

/** Prints the table; returns the plot. */
export async function measureHistories(plan: HistoryPlan): Promise<string> {
  const data = mkdtempSync(join(tmpdir(), "kvasir-bench-"));
  const times: Times = new Map();
  let loadMs = 0;
  try {
    for (let repeat = 0; repeat < plan.repeats; repeat++) {
      const placed = await openWithHistories(plan, data);
      for (const length of rotated(plan.lengths, repeat)) measureLength(placed, length, repeat, times);
      placed.flush();
      placed.engine.close();
      const beginMs = performance.now();
      const restarted = await PlacedEngine.open({ ...plan.engine, data });
      loadMs = performance.now() - beginMs;
      for (const length of rotated(plan.lengths, repeat)) {
        note(times, "cold restart", length, probeFrom(restarted, length, repeat, "disk"));
      }
      restarted.engine.close();
    }
  } finally {
    rmSync(data, { recursive: true });
  }
  console.log(`\n${plan.name}: ms from a request of the history and ${NEW_TOKENS} new tokens to the first token`);
  console.log(`medians of ${plan.repeats} (share of recomputing); a cold restart took ${Math.round(loadMs)} ms before`);
  const share = (source: Source, length: number) =>
    medianOf(times, source, length) / medianOf(times, "recompute", length);
  const rows = plan.lengths.map((length) => [
    String(length),
    ...SOURCES.map((source) => `${medianOf(times, source, length).toFixed(1)} (${share(source, length).toFixed(2)})`),
  ]);
  console.log(markdownTable([["history", ...SOURCES], ...rows]));
  const lines: Line[] = SOURCES.map((source, i) => ({
    name: source,
    color: COLORS[i]!,
    points: plan.lengths.map((length) => [length, Math.min(1, share(source, length))]),
  }));
  const labels = { x: "tokens of history", y: "of the time to recompute it" };
  return linePlot({ title: `Time to first token, ${plan.name}`, ...labels }, lines);
}

/** By number of layers that must be there; the history comes from host memory. */
export async function sweepPreload(plan: HistoryPlan, layers: number): Promise<void> {
  const length = Math.max(...plan.lengths);
  const wanted = [...Array.from({ length: layers + 1 }, (_, i) => i), null];
  const times = new Map<number | null, { ttftMs: number; loadMs: number }[]>();
  const data = mkdtempSync(join(tmpdir(), "kvasir-bench-"));
  try {
    for (let repeat = 0; repeat < plan.repeats; repeat++) {
      for (const preloadLayers of rotated(wanted, repeat)) {
        const cache = { ...plan.engine.cache, preloadLayers };
        const placed = await PlacedEngine.open({ ...plan.engine, data, cache });
        for (let i = 0; i < 3; i++) {
          if (i === 0) placed.engine.ask(historyOf(length), { maxTokens: 1 });
          placed.place("host");
          const finish = placed.probe(historyOf(length), randomText(NEW_TOKENS, repeat * 10 + i, VOCAB), false);
          if (i > 0) times.set(preloadLayers, [...(times.get(preloadLayers) ?? []), finish.timings]);
        }
        placed.engine.close();
      }
    }
  } finally {
    rmSync(data, { recursive: true });
  }
  console.log(`\n${plan.name}: layers that must be loaded before the step starts, ${length} tokens from host memory`);
  const cells = wanted.map((layers) => {
    const each = times.get(layers)!;
    const name = layers === null ? "as many as hide the rest" : String(layers);
    return [name, median(each.map(({ ttftMs }) => ttftMs)), median(each.map(({ loadMs }) => loadMs))];
  });
  console.log(markdownTable([["--preload-layers", "ms to first token", "ms of loading"], ...cells]));
}

async function openWithHistories(plan: HistoryPlan, data: string): Promise<PlacedEngine> {
  const placed = await PlacedEngine.open({ ...plan.engine, data });
  for (const length of plan.lengths) placed.engine.ask(historyOf(length), { maxTokens: 1 });
  return placed;
}

function measureLength(placed: PlacedEngine, length: number, repeat: number, times: Times): void {
  const added = randomText(NEW_TOKENS, 7000 + repeat, VOCAB);
  const { timings } = placed.probe(historyOf(length), added, true);
  note(times, "recompute", length, timings.ttftMs);
  // First so that it lies in gpu memory alone.
  placed.probe(historyOf(length), added, false);
  for (const place of ["gpu", "host", "disk"] as const) {
    placed.place(place);
    note(times, place, length, probeFrom(placed, length, repeat, place));
  }
}

/** Throws when the history did not come from there. */
function probeFrom(placed: PlacedEngine, length: number, repeat: number, place: Place): number {
  const { usage, timings } = placed.probe(historyOf(length), randomText(NEW_TOKENS, 9000 + repeat, VOCAB), false);
  if (usage.cachedTokens[place] < length) {
    throw new Error(`${length} tokens were to come from ${place}: ${JSON.stringify(usage.cachedTokens)}`);
  }
  return timings.ttftMs;
}

function historyOf(length: number): number[] {
  return randomText(length, length, VOCAB);
}

function note(times: Times, source: Source, length: number, ms: number): void {
  const key = `${source} ${length}`;
  times.set(key, [...(times.get(key) ?? []), ms]);
}

function medianOf(times: Times, source: Source, length: number): number {
  return median(times.get(`${source} ${length}`)!);
}

/** Who goes first changes, so that what slows the machine down for a while hits all of them. */
function rotated<Item>(items: readonly Item[], by: number): Item[] {
  const at = by % items.length;
  return [...items.slice(at), ...items.slice(0, at)];
}
