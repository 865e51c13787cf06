// `npm run edge` and `npm run sidecar` told to stop as a terminal's Ctrl-C does it, and a service manager: the signal
// goes to all processes of the group, start.mjs passes it on, and npm does so, too, which is played here.

import { afterAll, afterEach, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { SidecarClient } from "../../edge/sidecar-client.ts";
import "../support/cpu-library.ts"; // built before the first test's time runs
import { user } from "../support/edge.ts";
import { FAKE_SECRET, FakeSidecar } from "../support/fake-sidecar.ts";
import { startPostgres, type TestPostgres } from "../support/postgres.ts";
import { MODEL } from "../support/sidecar-process.ts";
import { submitRequest } from "../support/submit-request.ts";
import { Watch } from "../support/watch.ts";

setDefaultTimeout(120_000);

const START = join(import.meta.dir, "../../start.mjs");
const SMALL = ["--backend", "cpu", "--gpu-memory", "64M", "--host-memory", "32M", "--disk", "64M"];
const quietLog = { debug() {}, info() {}, warn() {}, error() {} };
let folder: string;
let pg: TestPostgres;
const running = new Set<ChildProcess>();

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), "kvasir-test-stop-"));
  pg = await startPostgres();
});

afterEach(async () => {
  for (const child of running) {
    process.kill(-child.pid!, "SIGKILL"); // a failed test has left it
    await once(child, "exit");
  }
});

afterAll(async () => {
  await pg?.remove();
  rmSync(folder, { recursive: true });
});

/** Resolves with its URL when it listens; it leads a process group. */
async function start(part: "edge" | "sidecar", flags: readonly string[], env: Readonly<Record<string, string>> = {}) {
  const child = spawn("node", [START, part, "--port", "0", ...flags], {
    detached: true,
    stdio: ["ignore", "pipe", "inherit"],
    env: { ...process.env, KVASIR_SIDECAR_SECRET: FAKE_SECRET, ...env },
  });
  running.add(child);
  const watch = new Watch();
  let output = "";
  child.stdout.on("data", (chunk: Buffer) => {
    output += chunk.toString();
    watch.notify();
  });
  const exited = once(child, "close").then(([code]) => {
    running.delete(child);
    watch.notify();
    return code as number | null;
  });
  const until = (text: string) => watch.until(() => output.includes(text) || !running.has(child));
  const url = () => new RegExp(`${part} listening on (\\S+)\n`).exec(output)?.[1];
  await watch.until(() => url() !== undefined || !running.has(child));
  if (url() === undefined) throw new Error(`it ended: ${output}`);
  const signalGroup = (signal: NodeJS.Signals) => process.kill(-child.pid!, signal);
  return { url: url()!, output: () => output, until, exited, signalGroup };
}

test.each(["SIGINT", "SIGTERM"] as const)("an edge whose group gets %s ends its answers first", async (signal) => {
  const released = Promise.withResolvers<void>();
  const sidecar = new FakeSidecar({
    script: async (stream) => {
      stream.delta("last");
      await released.promise;
      stream.delta(" words");
      stream.done();
    },
  });
  try {
    const edge = await start("edge", ["--sidecar", sidecar.url, "--database-url", pg.url, "--log-level", "silent"]);
    const response = await fetch(`${edge.url}/v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...user("hi"), stream: true }),
    });
    edge.signalGroup(signal);
    // Until the signal has arrived new requests are answered; then they are refused.
    while ((await fetch(`${edge.url}/v1/models`)).status !== 503);
    edge.signalGroup(signal);
    expect((await fetch(`${edge.url}/v1/models`)).status).toBe(503);
    released.resolve();
    const text = await response.text();
    expect(text).toContain(" words");
    expect(text).toEndWith("data: [DONE]\n\n");
    expect(await edge.exited).toBe(0);
  } finally {
    await sidecar.stop();
  }
});

test("a sidecar whose group gets SIGINT ends its answers first", async () => {
  const sidecar = await start("sidecar", ["--data", folder, ...SMALL]);
  const ready = Promise.withResolvers<void>();
  const address = { url: sidecar.url, secret: FAKE_SECRET, edgeName: "test", log: quietLog };
  const client = new SidecarClient({ ...address, onChange: ready.resolve });
  await ready.promise;
  const sampling = { temperature: 0, maxTokens: 600, ignoreEos: true };
  const stream = client.submit(submitRequest({ model: MODEL, sampling }));
  await stream.next();
  sidecar.signalGroup("SIGINT");
  await sidecar.until("stopping: waiting");
  sidecar.signalGroup("SIGINT");
  for (;;) {
    const event = await stream.next();
    if (event.type !== "done") continue;
    expect(event.done.usage.completionTokens).toBe(600);
    break;
  }
  client.close();
  expect(await sidecar.exited).toBe(0);
  expect(sidecar.output()).toEndWith("sidecar stopped\n");
});
