// Hit rate and time to first token against the number of conversations, across the cliffs where they no longer fit gpu
// memory, host memory and disk.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { linePlot } from "../../sidecar/simulate/line-plot.ts";
import type { ModelEngineOptions } from "../support/model-engine.ts";
import { SeededRandom } from "../support/seeded-random.ts";
import { markdownTable, median } from "../support/table.ts";
import { PlacedEngine, randomText } from "./placed-engine.ts";

const HISTORY_TOKENS = 512;
const NEW_TOKENS = 30;
const VOCAB = 6000;
const BLOCK_TOKENS = 64;
/** Conversations that each tier holds. */
const ROOM = { gpu: 8, host: 16, disk: 24 };

interface Point {
  readonly conversations: number;
  readonly gpu: number;
  readonly host: number;
  readonly disk: number;
  /** Lost, or not read in time: share of the history's tokens by reason. */
  readonly missed: string;
  readonly ttftMs: number;
  readonly meanTtftMs: number;
}

/** Prints the table; returns the plot. */
export async function sweepWorkingSet(
  engine: Omit<ModelEngineOptions, "data">,
  counts: readonly number[],
  turns: number,
): Promise<string> {
  const blocks = HISTORY_TOKENS / BLOCK_TOKENS;
  // Two more for the new tokens.
  const sizes = { gpuBlocks: ROOM.gpu * blocks + 2, hostBlocks: ROOM.host * blocks, diskBlocks: ROOM.disk * blocks };
  const points: Point[] = [];
  for (const count of counts) points.push(await measure({ ...engine, ...sizes }, count, turns));
  console.log(
    `\nworking set: ${turns} turns of conversations chosen evenly, ${HISTORY_TOKENS} tokens of history and ` +
      `${NEW_TOKENS} new; gpu holds ${ROOM.gpu}, host ${ROOM.host}, disk ${ROOM.disk} of them`,
  );
  const rate = (value: number) => `${(value * 100).toFixed(1)} %`;
  const rows = points.map(({ conversations, gpu, host, disk, missed, ttftMs, meanTtftMs }) => [
    String(conversations), rate(gpu), rate(host), rate(disk), rate(gpu + host + disk), missed, ttftMs, meanTtftMs,
  ]);
  const head = ["conversations", "gpu", "host", "disk", "cached", "missed", "median ms to first token", "mean"];
  console.log(markdownTable([head, ...rows]));
  const slowest = Math.max(...points.map(({ meanTtftMs }) => meanTtftMs));
  const line = (name: string, color: string, y: (point: Point) => number, isDashed = false) =>
    ({ name, color, isDashed, points: points.map((point) => [point.conversations, y(point)] as const) });
  return linePlot(
    { title: "Cached share of the history, by tier", x: "conversations", y: "of the tokens" },
    [
      line("gpu", "#0a7", ({ gpu }) => gpu),
      line("+ host", "#06c", ({ gpu, host }) => gpu + host),
      line("+ disk", "#c60", ({ gpu, host, disk }) => gpu + host + disk),
      line("mean TTFT, of the longest", "#555", ({ meanTtftMs }) => meanTtftMs / slowest, true),
    ],
  );
}

async function measure(options: Omit<ModelEngineOptions, "data">, count: number, turns: number): Promise<Point> {
  const data = mkdtempSync(join(tmpdir(), "kvasir-bench-"));
  const placed = await PlacedEngine.open({ ...options, data });
  const histories = Array.from({ length: count }, (_, i) => randomText(HISTORY_TOKENS, i, VOCAB));
  for (const history of histories) placed.engine.ask(history, { maxTokens: 1 });
  const random = new SeededRandom(count);
  const cached = { gpu: 0, host: 0, disk: 0 };
  const missed = new Map<string, number>();
  const times: number[] = [];
  for (let turn = -Math.ceil(turns / 4); turn < turns; turn++) {
    const history = histories[random.integer(0, count - 1)]!;
    const { usage, timings, missReasons } = placed.probe(history, randomText(NEW_TOKENS, turn + 50_000, VOCAB), false);
    if (turn < 0) continue; // until each tier holds what it holds in the long run
    for (const tier of ["gpu", "host", "disk"] as const) cached[tier] += usage.cachedTokens[tier];
    for (const [reason, tokens] of Object.entries(missReasons)) missed.set(reason, (missed.get(reason) ?? 0) + tokens);
    times.push(timings.ttftMs);
  }
  placed.engine.close();
  rmSync(data, { recursive: true });
  const share = (tokens: number) => tokens / (turns * HISTORY_TOKENS);
  return {
    conversations: count,
    gpu: share(cached.gpu),
    host: share(cached.host),
    disk: share(cached.disk),
    missed: describeMissed(missed, turns),
    ttftMs: median(times),
    meanTtftMs: times.reduce((sum, ms) => sum + ms, 0) / times.length,
  };
}

/** New tokens are always absent; they are not counted. */
function describeMissed(tokens: ReadonlyMap<string, number>, turns: number): string {
  const parts = [...tokens].map(([reason, count]) => {
    const missed = reason === "absent" ? count - turns * NEW_TOKENS : count;
    return missed > 0 ? `${reason} ${((missed / (turns * HISTORY_TOKENS)) * 100).toFixed(1)} %` : null;
  });
  return parts.filter((part) => part !== null).join(", ") || "none";
}
