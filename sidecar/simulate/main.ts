// bun run simulate: a trace, the cache policies of the server, and what they make of it. See README.md
// beside this.

import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { OptionError } from "../../config/options.ts";
import type { PolicyName } from "../kvcache/policy.ts";
import { type Line, linePlot, type PlotLabels } from "./line-plot.ts";
import { atLoad, loadOf, readSimulatorOptions, simulatorHelp } from "./options.ts";
import type { RunConfig, SimulatorOptions } from "./options.ts";
import { type PolicyResult, resultTable, type SweepPoint, sweepTable } from "./report.ts";
import { Simulation, type SimulationConfig } from "./simulation.ts";
import { TraceError } from "./trace.ts";

interface Sweep {
  readonly name: string;
  readonly label: string;
  readonly points: readonly SweepPoint[];
}

const COLORS: Readonly<Record<PolicyName, string>> = {
  "scheduler-aware": "#0b6e99",
  lru: "#c8501e",
  fifo: "#7a5195",
};

function main(argv: readonly string[]): void {
  const options = readSimulatorOptions(argv);
  if (options === null) {
    console.log(simulatorHelp(argv.filter((word) => word !== "--help")));
    return;
  }
  const { config, policies } = options;
  console.log(describeRun(options));
  const results = runPolicies(config, policies);
  console.log(`\n${resultTable(results)}`);
  const sweeps = runSweeps(options);
  if (options.jsonPath !== null) writeJson(options, results, sweeps);
  if (options.svgDirectory !== null) writePlots(options.svgDirectory, sweeps);
}

function runPolicies(config: RunConfig, policies: readonly PolicyName[]): PolicyResult[] {
  return policies.map((policy) => {
    const full: SimulationConfig = { ...config, policy };
    return { policy, measured: new Simulation(full).run() };
  });
}

function runSweeps({ config, policies, sweeps }: SimulatorOptions): Sweep[] {
  const { capacity, load, thinkSeconds } = sweeps;
  const diskAt = (factor: number) => Math.floor(config.diskBlocks * factor);
  const sweep = (
    name: string,
    label: string,
    values: readonly number[],
    at: (value: number) => RunConfig,
  ): Sweep[] => {
    if (values.length === 0) return [];
    const points = values.map((value) => ({ value, results: runPolicies(at(value), policies) }));
    console.log(`\n${sweepTable(label, points)}`);
    return [{ name, label, points }];
  };
  return [
    ...sweep("capacity", "disk, multiple", capacity, (factor) => ({
      ...config,
      diskBlocks: diskAt(factor),
    })),
    ...sweep("load", "load", load, (factor) => atLoad(config, factor)),
    ...sweep("think", "think time, s", thinkSeconds, (seconds) => ({ ...config, thinkMs: seconds * 1000 })),
  ];
}

function describeRun({ preset, traceName, config }: SimulatorOptions): string {
  const turns = config.sessions.reduce((sum, session) => sum + session.length, 0);
  const { hostBlocks, diskBlocks, blockBytes, sessionCount, sessions } = config;
  const gigabytes = (blocks: number) => `${((blocks * blockBytes) / 1e9).toFixed(1)} GB`;
  return [
    `preset ${preset}, trace ${traceName}: ${sessions.length} sessions, ${turns} turns`,
    `${sessionCount} sessions run, seed ${config.seed}`,
    `host ${gigabytes(hostBlocks)}, disk ${gigabytes(diskBlocks)}, block ${(blockBytes / 1e6).toFixed(1)} MB`,
    `load ${loadOf(config).toFixed(2)} times what the service can do when all history is cached`,
  ].join("\n");
}

function writeJson(
  options: SimulatorOptions,
  results: readonly PolicyResult[],
  sweeps: readonly Sweep[],
): void {
  const { preset, traceName, config } = options;
  const { sessions, ttlMs, ...numbers } = config;
  const finiteTtlMs = Number.isFinite(ttlMs) ? ttlMs : null;
  const settings = { ...numbers, ttlMs: finiteTtlMs, traceSessions: sessions.length };
  const document = { preset, trace: traceName, load: loadOf(config), settings, results, sweeps };
  writeFileSync(options.jsonPath!, `${JSON.stringify(document, null, 2)}\n`);
}

function writePlots(directory: string, sweeps: readonly Sweep[]): void {
  mkdirSync(directory, { recursive: true });
  for (const { name, label, points } of sweeps) {
    const hitRate = policyLines(points, (result) => result.measured.hitRate.turnsWithHistory);
    hitRate.push(optimumLine(points));
    const inMemory = policyLines(points, (result) => result.measured.hitRate.inMemory);
    writePlot(join(directory, `${name}-hit-rate.svg`), hitRate, {
      title: "Hit rate over turns with history",
      x: label,
      y: "hits",
    });
    writePlot(join(directory, `${name}-in-memory.svg`), inMemory, {
      title: "Share of hits that were in memory when needed",
      x: label,
      y: "of hits",
    });
  }
}

function writePlot(path: string, lines: readonly Line[], labels: PlotLabels): void {
  writeFileSync(path, linePlot(labels, lines));
  console.log(`wrote ${path}`);
}

function policyLines(points: readonly SweepPoint[], toY: (result: PolicyResult) => number): Line[] {
  return points[0]!.results.map(({ policy }, i) => ({
    name: policy,
    color: COLORS[policy],
    points: points.map(({ value, results }) => [value, toY(results[i]!)] as const),
  }));
}

/**
 * Of the first policy's run: the order of turns differs a little between policies, and so does the optimum.
 */
function optimumLine(points: readonly SweepPoint[]): Line {
  return {
    name: "optimum",
    color: "#444",
    isDashed: true,
    points: points.map(({ value, results }) => [value, results[0]!.measured.optimumHitRate.turnsWithHistory]),
  };
}

try {
  main(process.argv.slice(2));
} catch (error) {
  if (!(error instanceof OptionError || error instanceof TraceError)) throw error;
  console.error(error.message);
  process.exit(2);
}
