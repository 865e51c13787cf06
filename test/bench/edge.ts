// The edge alone, on Bun and on Deno: requests per second, and the time it adds to a first token and to
// a whole answer against the same sidecar asked directly. The sidecar is scripted and answers at once;
// it, the clients and the database share the machine with the edge, so these are floors, not capacities.
//
//   bun run test/bench/edge.ts [--seconds 2] [--clients 32] [--tokens 20]

import { cpus } from "node:os";
import { SidecarClient } from "../../edge/sidecar-client.ts";
import type { Runtime } from "../support/edge-process.ts";
import { RUNTIMES, startEdgeProcess } from "../support/edge-process.ts";
import type { FakeStream } from "../support/fake-sidecar.ts";
import { FAKE_MODEL, FAKE_SECRET, FakeSidecar } from "../support/fake-sidecar.ts";
import { startPostgres } from "../support/postgres.ts";
import { submitRequest, chatRequest } from "../../edge/chat-request.ts";
import { benchOptions } from "./bench-options.ts";

const values = benchOptions(import.meta.path, {
  seconds: { type: "string", default: "2" },
  clients: { type: "string", default: "32" },
  tokens: { type: "string", default: "20" },
});
const durationMs = Number(values.seconds) * 1000;
const clientCount = Number(values.clients);
const tokenCount = Number(values.tokens);

const body = { model: FAKE_MODEL, messages: [{ role: "user" as const, content: "hello" }] };
const quiet = { debug() {}, info() {}, warn() {}, error() {} };

type Sample = { firstMs: number; totalMs: number };
type Ask = () => Promise<Sample>;

/** One frame per token, all at once. */
function answer(stream: FakeStream): void {
  for (let i = 0; i < tokenCount; i++) stream.delta(" token");
  stream.done();
}

function overHttp(url: string, fields: object): Ask {
  return async () => {
    const startMs = performance.now();
    const response = await fetch(`${url}/v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, ...fields }),
    });
    if (!response.ok) throw new Error(await response.text());
    let firstMs = 0;
    for await (const _ of response.body!) firstMs ||= performance.now() - startMs;
    return { firstMs, totalMs: performance.now() - startMs };
  };
}

function direct(client: SidecarClient): Ask {
  const limits = { salt: new Uint8Array(32), maxModelLen: 2048, deadlineMs: 60_000 };
  const request = submitRequest(chatRequest.parse(body), limits);
  return async () => {
    const startMs = performance.now();
    const stream = client.submit(request);
    let firstMs = 0;
    while ((await stream.next()).type !== "done") firstMs ||= performance.now() - startMs;
    return { firstMs, totalMs: performance.now() - startMs };
  };
}

/** `clients` ask one after the other for the bench's time; the first tenth is warm-up. */
async function measure(ask: Ask, clients: number) {
  const startMs = performance.now();
  const samples: Sample[] = [];
  const one = async () => {
    for (;;) {
      const sample = await ask();
      const elapsedMs = performance.now() - startMs;
      if (elapsedMs > durationMs) return;
      if (elapsedMs > durationMs / 10) samples.push(sample);
    }
  };
  await Promise.all(Array.from({ length: clients }, one));
  return {
    perSecond: samples.length / ((durationMs * 0.9) / 1000),
    firstMs: median(samples.map((sample) => sample.firstMs)),
    totalMs: median(samples.map((sample) => sample.totalMs)),
  };
}

function median(numbers: number[]): number {
  return numbers.toSorted((a, b) => a - b)[Math.floor(numbers.length / 2)] ?? Number.NaN;
}

function row(...cells: (string | number)[]): void {
  const text = cells.map((cell) => (typeof cell === "number" ? cell.toFixed(2) : cell));
  console.log(text.map((cell, i) => (i === 0 ? cell.padEnd(34) : cell.padStart(12))).join(""));
}

const pg = await startPostgres();
const sidecar = new FakeSidecar({ script: answer });
try {
  console.log(`${cpus()[0]?.model}, ${cpus().length} cores, ${clientCount} clients, ${tokenCount} tokens`);
  row("", "answers/s", "x direct", "first ms", "total ms");
  const ready = Promise.withResolvers<void>();
  const options = { url: sidecar.url, secret: FAKE_SECRET, edgeName: "bench", log: quiet };
  const client = new SidecarClient({ ...options, onChange: ready.resolve });
  await ready.promise;
  const alone = await measure(direct(client), 1);
  const many = await measure(direct(client), clientCount);
  client.close();
  row("sidecar alone, 1 client", alone.perSecond, 1, alone.firstMs, alone.totalMs);
  row(`sidecar alone, ${clientCount} clients`, many.perSecond, 1, many.firstMs, many.totalMs);
  const rates = new Map<Runtime, number>();
  for (const runtime of RUNTIMES) {
    const edge = await startEdgeProcess(runtime, pg.url, [sidecar], ["--log-level", "silent"]);
    for (const stream of [false, true]) {
      const kind = stream ? "stream" : "plain";
      const single = await measure(overHttp(edge.url, { stream }), 1);
      const busy = await measure(overHttp(edge.url, { stream }), clientCount);
      const { perSecond, firstMs, totalMs } = single;
      row(`${runtime}, ${kind}, 1 client`, perSecond, perSecond / alone.perSecond, firstMs, totalMs);
      row("  added by the edge", "", "", firstMs - alone.firstMs, totalMs - alone.totalMs);
      const label = `${runtime}, ${kind}, ${clientCount} clients`;
      row(label, busy.perSecond, busy.perSecond / many.perSecond, busy.firstMs, busy.totalMs);
      if (stream) rates.set(runtime, busy.perSecond);
    }
    await edge.stop();
  }
  console.log(`Bun over Deno, streams: ${(rates.get("bun")! / rates.get("deno")!).toFixed(2)}`);
} finally {
  await sidecar.stop();
  await pg.remove();
}
