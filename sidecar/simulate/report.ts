// Results as text: one column per policy, one line per quantity.

import type { PolicyName } from "../kvcache/policy.ts";
import type { Measured } from "./measurements.ts";

export interface PolicyResult {
  readonly policy: PolicyName;
  readonly measured: Measured;
}

type Row = readonly [label: string, format: (measured: Measured) => string];

const ROWS: readonly Row[] = [
  ["hit rate, turns with history", (m) => percent(m.hitRate.turnsWithHistory)],
  ["hit rate, all turns", (m) => percent(m.hitRate.allTurns)],
  ["hit rate, prompt tokens", (m) => percent(m.hitRate.tokens)],
  ["  of these from gpu / host / disk", (m) => tierShares(m)],
  ["hits wholly in memory at start", (m) => percent(m.hitRate.inMemory)],
  ["optimum, turns with history", (m) => percent(m.optimumHitRate.turnsWithHistory)],
  ["optimum, prompt tokens", (m) => percent(m.optimumHitRate.tokens)],
  ["TTFT with queue: mean, p95", (m) => `${seconds(m.ttftMs.mean)}, ${seconds(m.ttftMs.p95)}`],
  ["TTFT from slot: mean, p95", (m) => `${seconds(m.serviceTtftMs.mean)}, ${seconds(m.serviceTtftMs.p95)}`],
  ["queue: mean, max turns", (m) => `${m.queue.meanTurns.toFixed(0)}, ${m.queue.maxTurns}`],
  ["KV of the queue: mean, max", (m) => `${gigabytes(m.queue.meanBytes)}, ${gigabytes(m.queue.maxBytes)}`],
  ["paper's windows: prefetch, evict", (m) => `${m.prefetchWindowSequences}, ${m.evictionWindowSequences}`],
  ["prompt tokens computed (all turns)", (m) => `${(m.computedTokens / 1e6).toFixed(2)} M`],
  ["host to GPU", (m) => gigabytes(m.hostToGpuBytes)],
  ["GPU to host", (m) => gigabytes(m.gpuToHostBytes)],
  ["disk read (on demand)", (m) => `${gigabytes(m.bytes.diskRead)} (${gigabytes(m.bytes.diskReadOnDemand)})`],
  ["disk written", (m) => gigabytes(m.bytes.diskWritten)],
  ["blocks lost, expired, not saved", (m) => `${m.lostBlocks}, ${m.expiredBlocks}, ${m.skippedSaveBlocks}`],
  ["GPU busy: prefill, decode", (m) => `${hours(m.prefillMs)}, ${hours(m.decodeMs)}`],
  ["from first arrival to last answer", (m) => hours(m.makespanMs)],
];

export function resultTable(results: readonly PolicyResult[]): string {
  const header = ["", ...results.map(({ policy }) => policy)];
  const rows = ROWS.map(([label, format]) => {
    const row = [label];
    for (const { measured } of results) row.push(format(measured));
    return row;
  });
  return alignColumns([header, ...rows]);
}

export interface SweepPoint {
  readonly value: number;
  readonly results: readonly PolicyResult[];
}

/** Hit rates over turns with history (and the share in memory) of each policy, one line per point. */
export function sweepTable(label: string, points: readonly SweepPoint[]): string {
  const policies = points[0]!.results.map(({ policy }) => policy);
  return alignColumns([
    [label, ...policies, "optimum", ...policies.map((policy) => `${policy} in memory`), "queue KV, max"],
    ...points.map(({ value, results }) => [
      String(value),
      ...results.map(({ measured }) => percent(measured.hitRate.turnsWithHistory)),
      percent(results[0]!.measured.optimumHitRate.turnsWithHistory),
      ...results.map(({ measured }) => percent(measured.hitRate.inMemory)),
      gigabytes(results[0]!.measured.queue.maxBytes),
    ]),
  ]);
}

function alignColumns(cells: readonly (readonly string[])[]): string {
  const widths = cells[0]!.map((_, column) => Math.max(...cells.map((row) => row[column]!.length)));
  const pad = (cell: string, column: number) =>
    column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!);
  return cells.map((row) => row.map(pad).join("  ").trimEnd()).join("\n");
}

function tierShares({ hitTokens: { gpu, host, disk } }: Measured): string {
  const sum = gpu + host + disk;
  return [gpu, host, disk].map((tokens) => percent(sum === 0 ? 0 : tokens / sum)).join(" / ");
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)}%`;
}

function seconds(ms: number): string {
  return ms < 100_000 ? `${(ms / 1000).toFixed(2)} s` : hours(ms);
}

function hours(ms: number): string {
  return `${(ms / 3_600_000).toFixed(2)} h`;
}

function gigabytes(bytes: number): string {
  return bytes < 1e12 ? `${(bytes / 1e9).toFixed(0)} GB` : `${(bytes / 1e12).toFixed(2)} TB`;
}
