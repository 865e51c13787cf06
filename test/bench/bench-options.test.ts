// Every bench says how it is called, and what it does not know, without a stack trace.

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";

setDefaultTimeout(60_000);

const BENCHES = ["cpu", "disk", "edge", "recall", "throughput", "tiers", "truncation", "turns"];

function run(bench: string, option: string) {
  const program = join(import.meta.dir, `${bench}.ts`);
  const { exitCode, stdout, stderr } = Bun.spawnSync([process.execPath, program, option]);
  return { exitCode, stdout: stdout.toString(), stderr: stderr.toString() };
}

describe.each(BENCHES)("test/bench/%s.ts", (bench) => {
  const usage = new RegExp(`^[A-Z][^]*bun (run )?test/bench/${bench}\\.ts \\[--`);

  test("--help prints its opening comment", () => {
    const { exitCode, stdout, stderr } = run(bench, "--help");
    expect({ exitCode, stderr }).toEqual({ exitCode: 0, stderr: "" });
    expect(stdout).toMatch(usage);
  });

  test("an unknown option is refused with the same", () => {
    const { exitCode, stdout, stderr } = run(bench, "--hlep");
    expect({ exitCode, stdout }).toEqual({ exitCode: 1, stdout: "" });
    expect(stderr).toStartWith("Unknown option '--hlep'");
    expect(stderr.slice(stderr.indexOf("\n\n") + 2)).toMatch(usage);
    expect(stderr).not.toContain("node:");
  });
});
