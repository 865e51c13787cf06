// The simulator as a program: what it prints, what it writes, what it refuses.

import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { atLoad, loadOf, readSimulatorOptions } from "../../../sidecar/simulate/options.ts";
import { TRACE_COLUMNS } from "../../../sidecar/simulate/trace.ts";

const MAIN = join(import.meta.dir, "../../../sidecar/simulate/main.ts");
const directory = mkdtempSync(join(tmpdir(), "kvasir-simulate-"));
afterAll(() => rmSync(directory, { recursive: true }));

const trace = join(directory, "trace.tsv");
const lines = Array.from({ length: 40 }, (_, i) => `s${i >> 2}\t${(i % 4) + 1}\t-\t-\t100\t200`);
writeFileSync(trace, `${[TRACE_COLUMNS, ...lines].join("\n")}\n`);

async function simulate(...argv: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const child = Bun.spawn([process.execPath, MAIN, ...argv], { stdout: "pipe", stderr: "pipe" });
  const texts = [child.stdout, child.stderr].map((stream) => new Response(stream).text());
  const [stdout, stderr] = await Promise.all(texts);
  return { code: await child.exited, stdout: stdout!, stderr: stderr! };
}

describe("bun run simulate", () => {
  test("prints a table, and writes JSON and the plots of the sweeps that were asked for", async () => {
    const json = join(directory, "result.json");
    const svg = join(directory, "plots");
    const small = ["--trace", trace, "--warmup-turns", "0", "--host-memory", "1G", "--disk", "4G"];
    const outputs = ["--json", json, "--svg", svg, "--capacity-sweep", "0.5,1", "--load-sweep", "1,2"];
    const { code, stdout, stderr } = await simulate(...small, ...outputs);
    expect(stderr).toBe("");
    expect(code).toBe(0);
    expect(stdout).toContain("hit rate, turns with history");
    const { results, sweeps } = JSON.parse(readFileSync(json, "utf8"));
    const policies = results.map((result: { policy: string }) => result.policy);
    expect(policies).toEqual(["scheduler-aware", "lru", "fifo"]);
    expect(results[0].measured.turns).toBe(40);
    expect(sweeps.map((sweep: { name: string }) => sweep.name)).toEqual(["capacity", "load"]);
    const plots = ["capacity", "load"].flatMap((name) => [`${name}-hit-rate.svg`, `${name}-in-memory.svg`]);
    expect(readdirSync(svg).sort()).toEqual(plots);
    expect(readFileSync(join(svg, plots[0]!), "utf8")).toMatch(/^<svg .*<\/svg>\n$/s);
  });

  test("explains every option, with the defaults of the preset", async () => {
    const { code, stdout } = await simulate("--preset", "mooncake", "--help");
    expect(code).toBe(0);
    expect(stdout).toMatch(/--trace .*default mooncake/);
    expect(stdout).toMatch(/--kv-bytes-per-token .*default 131072/);
  });

  test("says what is wrong with an argument, and exits with 2", async () => {
    const { code, stderr, stdout } = await simulate("--policy", "lfu");
    expect(code).toBe(2);
    expect(stdout).toBe("");
    expect(stderr).toBe('--policy must name some of scheduler-aware, lru, fifo, not "lfu"\n');
  });
});

describe("options", () => {
  const small = ["--trace", trace, "--warmup-turns", "0"];

  test.each([
    [["--preset", "other"], "--preset must be one of paper, mooncake"],
    [["--batch", "0"], "--batch must be a number from 1"],
    [["--disk", "many"], "--disk must be a size"],
    [["--load-sweep", "1,x"], "--load-sweep must be numbers"],
    [["--low-watermark", "0.5"], "--low-watermark must not be above --high-watermark"],
    [["--warmup-turns", "40"], "--warmup-turns (40) must be below the 40 turns"],
    [["--context-window", "64"], "must be at least a block"],
    [["--rate", "trace"], "no arrival times: give --rate"],
    [["--bogus"], "Unknown option '--bogus'"],
    [["--trace", "nowhere.tsv"], "cannot read the trace nowhere.tsv"],
  ])("%p are refused", (argv, message) => {
    expect(() => readSimulatorOptions([...small, ...argv])).toThrow(message);
  });

  test("a load is a multiple of what the service can do", () => {
    const { config } = readSimulatorOptions([...small, "--load", "1.5"])!;
    expect(loadOf(config)).toBeCloseTo(1.5);
    const seconds = 4 * (100 / 14_000 + 200 / (35 * 24));
    expect(config.sessionRate).toBeCloseTo(1.5 / seconds);
  });

  test("a load stretches the trace's own times", () => {
    const { config } = readSimulatorOptions(["--preset", "mooncake"])!;
    expect(config.sessionRate).toBeNull();
    const halved = atLoad(config, loadOf(config) / 2);
    expect(halved.timeScale).toBeCloseTo(2);
  });

  test("--svg without a sweep draws capacity and load", () => {
    const { sweeps } = readSimulatorOptions([...small, "--svg", directory])!;
    expect([sweeps.capacity.length, sweeps.load.length, sweeps.thinkSeconds.length]).toEqual([8, 8, 0]);
    expect([sweeps.load[0], sweeps.load.at(-1)]).toEqual([0.5, 3]);
  });
});
