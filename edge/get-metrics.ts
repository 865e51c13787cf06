// GET /metrics: what this edge has counted, how it is doing, and what its sidecars say about themselves.

import type { Context } from "hono";
import { EXPOSITION_TYPE, fixedSeries, type Labels, render, type Series, type SeriesType } from "./prometheus.ts";
import type { Services } from "./services.ts";
import type { SidecarClient } from "./sidecar-client.ts";
import { soon } from "./soon.ts";

/** A sidecar that takes longer is left out: a scrape must not hang. */
const STATS_WAIT_MS = 2000;
/** Numbers of one sidecar at most. */
const STATS_MAX = 500;

/** Statistics that other inference servers have, too. All others are kvasir_sidecar_NAME. */
const KNOWN_STATS: Readonly<Record<string, readonly [type: SeriesType, name: string, help: string]>> = {
  runningSequences: ["gauge", "kvasir_num_requests_running", "Sequences in the sidecar's batch."],
  waitingSequences: ["gauge", "kvasir_num_requests_waiting", "Sequences in the sidecar's queue."],
  preemptions: ["counter", "kvasir_num_preemptions_total", "Sequences that lost their blocks to others."],
};

export async function getMetrics(c: Context, services: Services): Promise<Response> {
  const { metrics, sidecars } = services;
  const stats = await Promise.all(sidecars.clients.map(statsOf));
  const text = render([...metrics.series, ...edgeSeries(services), cacheUsage(stats), ...sidecarSeries(stats)]);
  return c.body(text, 200, { "content-type": EXPOSITION_TYPE });
}

type SidecarStats = { sidecar: string; stats: Record<string, unknown> };

async function statsOf(client: SidecarClient): Promise<SidecarStats> {
  const stats = client.isReady ? await soon(client.stats(), STATS_WAIT_MS).catch(() => null) : null; // away by now
  return { sidecar: client.name, stats: stats ?? {} };
}

function edgeSeries({ database, drain, sidecars, turns }: Services): Series[] {
  const up = sidecars.clients.map(({ name, url, isReady }) => [{ sidecar: name, url }, Number(isReady)] as const);
  const streams = sidecars.clients.map(({ name, url, inFlight }) => [{ sidecar: name, url }, inFlight] as const);
  return [
    fixedSeries("gauge", "kvasir_edge_answers", "Answers in progress on this edge.", [[{}, drain.inFlight]]),
    fixedSeries("gauge", "kvasir_database_up", "1: the database answers.", [[{}, Number(!database.isDown)]]),
    fixedSeries("counter", "kvasir_dropped_request_rows_total", "Request rows lost while the database was away.", [
      [{}, turns.droppedRowCount],
    ]),
    fixedSeries("gauge", "kvasir_sidecar_up", "1: this edge is connected to the sidecar.", up),
    fixedSeries("gauge", "kvasir_edge_streams", "Answers in progress on the connection to a sidecar.", streams),
  ];
}

/** Of the gpu tier what running sequences hold, as other servers count it; of the others what is filled. */
function cacheUsage(all: readonly SidecarStats[]): Series {
  const share = (part: unknown, whole: unknown) =>
    typeof part === "number" && typeof whole === "number" && whole > 0 ? part / whole : null;
  const samples = all.flatMap(({ sidecar, stats }) => {
    const available = share(stats["gpuBlocksAvailable"], stats["gpuBlocks"]);
    const byTier: Readonly<Record<string, number | null>> = {
      gpu: available === null ? null : 1 - available,
      host: share(stats["hostBlocksUsed"], stats["hostBlocks"]),
      disk: share(stats["diskBlocksUsed"], stats["diskBlocks"]),
    };
    return Object.entries(byTier).flatMap(([tier, value]): [Labels, number][] =>
      value === null ? [] : [[{ sidecar, tier }, value]],
    );
  });
  return fixedSeries("gauge", "kvasir_kv_cache_usage_perc", "Share of a tier's KV blocks in use, 0 to 1.", samples);
}

/** One series per statistic, with a sample per sidecar that has it. */
function sidecarSeries(all: readonly SidecarStats[]): Series[] {
  const samples = new Map<string, (readonly [Labels, number])[]>();
  for (const { sidecar, stats } of all) {
    for (const [path, value] of numbersIn(stats).slice(0, STATS_MAX)) {
      const values = samples.get(path) ?? [];
      samples.set(path, values);
      values.push([{ sidecar }, value]);
    }
  }
  return [...samples].map(([path, values]) => {
    const [type, name, help] = KNOWN_STATS[path] ?? [
      "untyped", `kvasir_sidecar_${snakeCase(path)}`, "As the sidecar counts it.",
    ] as const;
    return fixedSeries(type, name, help, values);
  });
}

/** Numbers by path, those of nested objects included: {a: {b: 1}} has "a.b". */
function numbersIn(stats: Readonly<Record<string, unknown>>, prefix = ""): [path: string, value: number][] {
  return Object.entries(stats).flatMap(([key, value]): [string, number][] => {
    const path = `${prefix}${key}`;
    if (typeof value === "number") return [[path, value]];
    const isNested = typeof value === "object" && value !== null && !Array.isArray(value) && prefix.length < 100;
    return isNested ? numbersIn(value as Record<string, unknown>, `${path}.`) : [];
  });
}

function snakeCase(path: string): string {
  return path
    .replaceAll(/([a-z0-9])([A-Z])/g, "$1_$2")
    .replaceAll(/\W+/g, "_")
    .toLowerCase();
}
