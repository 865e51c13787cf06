// The connection to a sidecar: hello, loss, reconnect, and frames that must not be believed.

import { afterEach, describe, expect, test } from "bun:test";
import type { CompletionEvent } from "../../edge/completion-stream.ts";
import { ApiError } from "../../edge/errors.ts";
import { DEFAULT_TIMINGS, SidecarClient } from "../../edge/sidecar-client.ts";
import { SidecarPool } from "../../edge/sidecar-pool.ts";
import type { SidecarFrame, SubmitRequest } from "../../sidecar/protocol.ts";
import { CloseCode, encodeFrame, FrameType, PROTOCOL_VERSION } from "../../sidecar/protocol.ts";
import { echo, FAKE_MODEL, FAKE_SECRET, FakeSidecar } from "../support/fake-sidecar.ts";

const quiet = { debug() {}, info() {}, warn() {}, error() {} };
const cleanups: (() => unknown)[] = [];

afterEach(async () => {
  for (const cleanup of cleanups.splice(0).toReversed()) await cleanup();
});

function fake(options: ConstructorParameters<typeof FakeSidecar>[0] = {}): FakeSidecar {
  const sidecar = new FakeSidecar(options);
  cleanups.push(() => sidecar.stop());
  return sidecar;
}

/** A pool over the sidecars, with short pauses, and who wants to know of its changes. */
function connect(urls: string[], secret = FAKE_SECRET) {
  const waiters = new Set<() => void>();
  const reasons: string[] = [];
  const clients: SidecarClient[] = [];
  const pool = new SidecarPool(clients, 2000);
  const wake = () => {
    pool.wake();
    for (const waiter of waiters) waiter();
    waiters.clear();
  };
  const note = (fields: unknown) => {
    reasons.push((fields as { reason: string }).reason);
    wake();
  };
  for (const url of urls) {
    clients.push(
      new SidecarClient({
        url,
        secret,
        edgeName: "test",
        log: { ...quiet, warn: note },
        timings: { ...DEFAULT_TIMINGS, backoffMinMs: 1, backoffMaxMs: 10 },
        onChange: wake,
      }),
    );
  }
  cleanups.push(() => pool.close());
  const until = async (condition: () => boolean) => {
    while (!condition()) await new Promise<void>((resolve) => waiters.add(resolve));
  };
  return { pool, clients, until, reasons };
}

function request(content = "a b c"): SubmitRequest {
  return {
    salt: new Uint8Array(32),
    conversation: null,
    model: FAKE_MODEL,
    messages: [{ role: "user", content }],
    sampling: {
      temperature: 1, topP: 1, topK: 0, minP: 0, seed: 1, frequencyPenalty: 0, presencePenalty: 0,
      repetitionPenalty: 1, logitBias: [], logprobs: null, n: 1, stop: [], maxTokens: null,
      ignoreEos: false,
    },
    deadlineMs: 10_000,
    truncation: "auto",
    cacheTtlS: null,
    priority: 0,
  };
}

function generate(pool: SidecarPool, options: { preferred?: string; key?: string } = {}) {
  const placed: string[] = [];
  const signal = new AbortController().signal;
  const onPlaced = async (name: string) => void placed.push(name);
  const placement = { key: options.key ?? "k", preferred: options.preferred ?? null, onPlaced, signal };
  return { placed, events: pool.generate(request(), placement) };
}

async function textOf(events: AsyncIterable<CompletionEvent>): Promise<string> {
  let text = "";
  for await (const event of events) {
    if (event.type === "deltas") text += event.deltas.map((delta) => delta.text).join("");
  }
  return text;
}

/** A server that answers the edge's hello with the given frames. */
function malicious(answers: (Uint8Array | string)[], onClose: (code: number, reason: string) => void) {
  const server = Bun.serve<undefined>({
    hostname: "127.0.0.1",
    port: 0,
    fetch: (req, srv) => (srv.upgrade(req, { data: undefined }) ? undefined : new Response("")),
    websocket: {
      message(socket) {
        for (const answer of answers) socket.send(answer);
      },
      close: (_socket, code, reason) => onClose(code, reason),
    },
  });
  cleanups.push(() => server.stop(true));
  return `ws://127.0.0.1:${server.port}`;
}

const hello = (version = PROTOCOL_VERSION): SidecarFrame => [
  FrameType.hello,
  version,
  "evil",
  { id: FAKE_MODEL, maxModelLen: 1, vocabSize: 1, blockTokens: 64, backend: "x", created: 1 },
];

describe("SidecarClient", () => {
  test("learns name and model from the hello, and answers stats and forgets", async () => {
    const sidecar = fake({ name: "north" });
    const { clients, until } = connect([sidecar.url]);
    await until(() => clients[0]!.isReady);
    expect(clients[0]).toMatchObject({ name: "north", model: { id: FAKE_MODEL } });
    expect(await clients[0]!.stats()).toEqual({ steps: 3 });
    expect(await clients[0]!.forget(new Uint8Array(32), "c1")).toEqual({ gpu: 1 });
    expect(sidecar.forgotten).toEqual(["c1"]);
  });

  test("with a wrong secret never becomes ready, says so once, and goes on trying", async () => {
    const sidecar = fake();
    const { clients, reasons, until } = connect([sidecar.url], "wrong");
    await until(() => reasons.length > 0);
    expect(clients[0]!.isReady).toBe(false);
    expect(sidecar.frames).toEqual([]);
    expect(reasons).toEqual(["it refused the connection (is KVASIR_SIDECAR_SECRET the sidecar's?)"]);
  });

  test("of a sidecar that is not there says nothing about secrets", async () => {
    const sidecar = fake();
    const { url } = sidecar;
    await sidecar.stop();
    const { reasons, until } = connect([url]);
    await until(() => reasons.length > 0);
    expect(reasons[0]).toMatch(/^it closed the connection \(code \d+\)$/);
  });

  test("reconnects to a sidecar that was restarted", async () => {
    const sidecar = fake();
    const { clients, pool, until } = connect([sidecar.url]);
    await until(() => clients[0]!.isReady);
    await sidecar.stop();
    await until(() => !clients[0]!.isReady);
    sidecar.start();
    expect(await textOf(generate(pool).events)).toBe("a b c");
  });

  test("closes a connection on which it cannot believe what it reads, with the reason", async () => {
    const cases: [(Uint8Array | string)[], number][] = [
      [["text"], CloseCode.malformedFrame],
      [[new Uint8Array([0xc1])], CloseCode.malformedFrame],
      [[encodeFrame([FrameType.pong, 1])], CloseCode.outOfOrder],
      [[encodeFrame(hello()), encodeFrame(hello())], CloseCode.outOfOrder],
      [[encodeFrame(hello(99))], CloseCode.wrongVersion],
      [
        [encodeFrame(hello()), encodeFrame([FrameType.delta, [[7, 0, "x", 1, null]]])],
        CloseCode.malformedFrame,
      ],
    ];
    for (const [answers, code] of cases) {
      const closed = Promise.withResolvers<number>();
      const url = malicious(answers, (closeCode) => closed.resolve(closeCode));
      connect([url]);
      expect(await closed.promise).toBe(code);
    }
  });
});

/** Numbers in [0, max) from a seed: mulberry32. */
function random(seed: number): (max: number) => number {
  let state = seed;
  return (max) => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % max;
  };
}

/** A frame of the sidecar with some bytes changed, cut off, or added. */
function mutate(frame: Uint8Array, next: (max: number) => number): Uint8Array {
  const bytes = [...frame];
  for (let i = next(4); i >= 0; i--) bytes[next(bytes.length)] = next(256);
  if (next(4) === 0) bytes.length = next(bytes.length);
  if (next(4) === 0) bytes.push(next(256), next(256));
  return Uint8Array.from(bytes);
}

describe("a sidecar that sends rubbish", () => {
  test("never harms the edge: each connection ends, and the next answer is right", async () => {
    const seed = Number(process.env["SEED"] ?? Date.now() % 2 ** 31);
    console.log(`SEED=${seed}`);
    const next = random(seed);
    let rubbish = 200;
    const sidecar = fake();
    sidecar.script = (stream) => {
      const deltas: SidecarFrame = [FrameType.delta, [[stream.id, 0, "text", 1, null]]];
      const error: SidecarFrame = [FrameType.error, stream.id, "internal", "no", null];
      stream.socket.send(mutate(encodeFrame(next(2) === 0 ? deltas : error), next));
      stream.done({ tokenCount: 2 ** 31 }); // no mutation makes this true
    };
    const { clients, pool, until } = connect([sidecar.url]);
    while (rubbish-- > 0) {
      await until(() => clients[0]!.isReady);
      const result = await textOf(generate(pool).events).catch((error: unknown) => error);
      expect(result).toBeInstanceOf(ApiError);
    }
    sidecar.script = echo;
    expect(await textOf(generate(pool).events)).toBe("a b c");
  });
});

describe("an answer", () => {
  test("of which nothing had arrived is submitted again after a reconnect", async () => {
    const sidecar = fake();
    let tries = 0;
    sidecar.script = (stream) => {
      if (++tries === 1) return stream.cut();
      stream.delta("again");
      stream.done();
    };
    const { pool } = connect([sidecar.url]);
    const { placed, events } = generate(pool);
    expect(await textOf(events)).toBe("again");
    expect(placed).toEqual(["fake", "fake"]);
  });

  test("that had begun fails with sidecar_lost when the connection breaks", async () => {
    const sidecar = fake();
    sidecar.script = (stream) => {
      stream.delta("half");
      stream.cut();
    };
    const { clients, pool } = connect([sidecar.url]);
    const text = textOf(generate(pool).events);
    await expect(text).rejects.toMatchObject({ status: 503, code: "sidecar_lost" });
    expect(sidecar.submits).toHaveLength(1);
    expect(clients[0]!.inFlight).toBe(0); // or placement would shun it for ever
  });

  test("with a wrong count at its end is not believed", async () => {
    const sidecar = fake();
    sidecar.script = (stream) => {
      stream.delta("x");
      stream.done({ tokenCount: 2 });
    };
    const { pool } = connect([sidecar.url]);
    await expect(textOf(generate(pool).events)).rejects.toMatchObject({ code: "sidecar_lost" });
  });

  test("moves to another sidecar when one is shutting down or full", async () => {
    for (const code of ["shutting_down", "queue_full"] as const) {
      const full = fake({ name: "full", script: (stream) => stream.error(code, "no", 1) });
      const free = fake({ name: "free" });
      const { clients, pool, until } = connect([full.url, free.url]);
      await until(() => clients.every((client) => client.isReady));
      const { placed, events } = generate(pool, { preferred: "full" });
      expect(await textOf(events)).toBe("a b c");
      expect(placed).toEqual(["full", "free"]);
    }
  });

  test("gets the refusal of the only sidecar there is", async () => {
    const sidecar = fake({ script: (stream) => stream.error("queue_full", "full", 7) });
    const { pool } = connect([sidecar.url]);
    const refused = textOf(generate(pool).events);
    await expect(refused).rejects.toMatchObject({ status: 429, retryAfterS: 7 });
    expect(sidecar.submits).toHaveLength(1);
  });

  test("goes to the sidecar that holds its cache, else by its key, always to the same one", async () => {
    const sidecars = ["a", "b", "c"].map((name) => fake({ name }));
    const { clients, pool, until } = connect(sidecars.map((sidecar) => sidecar.url));
    await until(() => clients.every((client) => client.isReady));
    for (const preferred of ["a", "b", "c"]) {
      const { placed, events } = generate(pool, { preferred });
      await textOf(events);
      expect(placed).toEqual([preferred]);
    }
    const places = async (key: string) => {
      const { placed, events } = generate(pool, { key });
      await textOf(events);
      return placed[0];
    };
    const keys = Array.from({ length: 30 }, (_, i) => `chat ${i}`);
    const first: (string | undefined)[] = [];
    for (const key of keys) first.push(await places(key));
    expect(new Set(first).size).toBe(3);
    for (const [i, key] of keys.entries()) expect(await places(key)).toBe(first[i]!);
  });
});
