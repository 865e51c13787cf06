// `npm test`: types, lint, the native library, and all tests; closes with one line that counts everything.
// Arguments go to `bun test`: `npm test -- test/db`.

import { type ChildProcess, spawn } from "node:child_process";
import { constants } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { buildNative } from "../sidecar/build-native.ts";
import { addCounts, type Counts, countTests } from "./test-counts.ts";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const TOOLS = join(ROOT, "node_modules", ".bin");
/** For each test, on a busy machine. */
const TEST_TIMEOUT_MS = 120_000;

let running: ChildProcess | null = null;

/** Runs this Bun with the arguments; what it prints is shown and returned. */
async function runBun(args: readonly string[]): Promise<{ code: number; output: string }> {
  const child = spawn(process.execPath, args, { cwd: ROOT, stdio: ["ignore", "pipe", "pipe"] });
  running = child;
  let output = "";
  for (const [from, to] of [
    [child.stdout, process.stdout],
    [child.stderr, process.stderr],
  ] as const) {
    from.on("data", (chunk: Buffer) => {
      output += chunk.toString();
      to.write(chunk);
    });
  }
  const code = await new Promise<number>((resolve, reject) => {
    child.once("error", reject);
    child.once("close", (code) => resolve(code ?? 1));
  });
  running = null;
  return { code, output };
}

/** One check that passes or fails as a whole. */
async function check(name: string, work: () => Promise<boolean>): Promise<Counts> {
  console.log(`\n== ${name}`);
  const hasPassed = await work();
  if (!hasPassed) console.log(`== ${name}: failed`);
  return hasPassed ? { passed: 1, failed: 0 } : { passed: 0, failed: 1 };
}

async function main(testArguments: readonly string[]): Promise<Counts> {
  const types = await check("types: tsc --noEmit", async () => {
    return (await runBun([join(TOOLS, "tsc"), "--noEmit"])).code === 0;
  });
  const lint = await check("lint: oxlint", async () => (await runBun([join(TOOLS, "oxlint")])).code === 0);
  const library = await check("native library", async () => {
    try {
      console.log(await buildNative("cpu", { onProgress: (message) => console.log(message) }));
      return true;
    } catch (error) {
      console.error((error as Error).message);
      return false;
    }
  });
  console.log("\n== tests: bun test");
  const { code, output } = await runBun(["test", `--timeout=${TEST_TIMEOUT_MS}`, ...testArguments]);
  return [types, lint, library, countTests(output, code)].reduce(addCounts);
}

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  process.on(signal, () => {
    running?.kill(signal);
    process.exit(128 + constants.signals[signal]);
  });
}
const { passed, failed } = await main(process.argv.slice(2));
console.log(`\n${passed} passed, ${failed} failed`);
process.exit(failed === 0 ? 0 : 1);
