// The sidecar's door: who may come in, what happens to those who break the rules, and that nobody else notices.

import { afterEach, describe, expect, test } from "bun:test";
import type { EngineEvent } from "../../sidecar/engine/request.ts";
import {
  CloseCode, type EdgeFrame, encodeFrame, FRAME_BYTES_MAX, FrameType, PROTOCOL_VERSION,
} from "../../sidecar/protocol.ts";
import type { SidecarServer } from "../../sidecar/server.ts";
import { fakeTokenizer } from "../support/fake-tokenizer.ts";
import { SeededRandom, testSeed } from "../support/seeded-random.ts";
import {
  cleanUp, Edge, finishEvent, greeted, HELLO, MODEL, SECRET, startServer, submit, tokenEvent,
} from "../support/sidecar-server.ts";

afterEach(cleanUp);

describe("SidecarServer at the door", () => {
  const upgrade = (server: SidecarServer, headers: Record<string, string>) =>
    fetch(server.url.replace("ws:", "http:"), { headers });

  test("refuses who has no secret or a wrong one, and whoever is a browser", async () => {
    const { server } = startServer();
    expect((await upgrade(server, {})).status).toBe(401);
    expect((await upgrade(server, { authorization: `Bearer ${SECRET}x` })).status).toBe(401);
    expect((await upgrade(server, { authorization: SECRET })).status).toBe(401);
    const authorization = `Bearer ${SECRET}`;
    expect((await upgrade(server, { authorization, origin: "http://127.0.0.1" })).status).toBe(403);
    expect((await upgrade(server, { authorization })).status).toBe(426);
    const edge = new Edge(server.url, { authorization: "Bearer no" });
    await edge.closing();
    expect(edge.wasOpen).toBe(false);
  });

  test("says that it refused a wrong secret, once for many tries, and nothing of who sends none", async () => {
    const said: string[] = [];
    const { server } = startServer({ say: (message) => said.push(message) });
    await upgrade(server, {});
    expect(said).toEqual([]);
    for (const secret of ["one", "another"]) await upgrade(server, { authorization: `Bearer ${secret}` });
    expect(said).toHaveLength(1);
    expect(said[0]).toMatch(/^refused an edge at 127\.0\.0\.1: wrong secret .*KVASIR_SIDECAR_SECRET/);
    expect(said[0]).not.toContain(SECRET);
  });

  test("greets, and says which model it serves", async () => {
    const { server } = startServer();
    const edge = await greeted(server);
    expect(edge.frames).toEqual([[FrameType.hello, PROTOCOL_VERSION, "sidecar-test", MODEL]]);
  });

  test("closes on a frame before hello, a second hello, and another version, and says why", async () => {
    const { server } = startServer();
    const early = await new Edge(server.url).opened();
    early.send([FrameType.ping, 1]);
    expect(await early.closing()).toEqual({ code: CloseCode.outOfOrder, reason: "the first frame must be hello" });
    const twice = await greeted(server);
    twice.send(HELLO);
    expect(await twice.closing()).toEqual({ code: CloseCode.outOfOrder, reason: "hello came twice" });
    const old = await new Edge(server.url).opened();
    old.send([FrameType.hello, PROTOCOL_VERSION + 1, "new edge"]);
    expect((await old.closing()).code).toBe(CloseCode.wrongVersion);
  });

  test("closes on frames that are no frames, and serves the others on", async () => {
    const { server } = startServer();
    const other = await greeted(server);
    const offences: [string, (edge: Edge) => void][] = [
      ["frames are binary", (edge) => edge.socket.send("hello")],
      ["not msgpack", (edge) => edge.sendBytes(Uint8Array.of(0xdc, 0xff))],
      ["a frame must be an array", (edge) => edge.sendBytes(Uint8Array.of(1))],
      ["unknown frame type 99", (edge) => edge.sendBytes(Uint8Array.of(0x91, 99))],
      ["unknown frame type 3", (edge) => edge.sendBytes(Uint8Array.of(0x92, 3, 0x90))],
      ["frame type 2, field 0", (edge) => edge.sendBytes(Uint8Array.of(0x92, 2, 0))],
      ["salt must be 32 bytes", (edge) => edge.send(submit(1, { salt: new Uint8Array(31) }))],
    ];
    for (const [reason, offend] of offences) {
      const edge = await greeted(server);
      offend(edge);
      const closing = await edge.closing();
      expect(closing.code).toBe(CloseCode.malformedFrame);
      expect(closing.reason).toContain(reason);
    }
    await other.expectAlive(7);
  });

  test("closes on a frame longer than any may be", async () => {
    const { server } = startServer();
    const [edge, other] = [await greeted(server), await greeted(server)];
    edge.sendBytes(new Uint8Array(FRAME_BYTES_MAX + 1));
    await edge.closing();
    await other.expectAlive(1);
  });

  const seed = testSeed();
  test(`random and mutated frames close at most their own connection (seed ${seed})`, async () => {
    const random = new SeededRandom(seed);
    const { server } = startServer({ maxRequests: 1000 });
    const other = await greeted(server);
    const valid = [HELLO, submit(3), [FrameType.abort, 3], [FrameType.statsRequest, 4], [FrameType.ping, 5]];
    let closedCount = 0;
    for (let round = 0; round < 150; round++) {
      const bytes = random.next() < 0.3
        ? Uint8Array.from({ length: random.integer(0, 60) }, () => random.integer(0, 255))
        : encodeFrame(valid[random.integer(0, valid.length - 1)] as EdgeFrame).slice();
      for (let i = random.integer(1, 3); i > 0 && bytes.length > 0; i--) {
        bytes[random.integer(0, bytes.length - 1)] = random.integer(0, 255);
      }
      const edge = await greeted(server);
      edge.sendBytes(bytes.subarray(0, random.next() < 0.3 ? random.integer(0, bytes.length) : bytes.length));
      edge.send([FrameType.ping, 99]);
      await edge.until(() => edge.closed !== null || edge.hasPong(99));
      if (edge.closed !== null) {
        closedCount++;
        const { malformedFrame, outOfOrder, wrongVersion } = CloseCode;
        expect([malformedFrame, outOfOrder, wrongVersion] as number[]).toContain(edge.closed.code);
        expect(edge.closed.reason).not.toBe("");
      }
      edge.socket.close();
    }
    expect(closedCount).toBeGreaterThan(30);
    await other.expectAlive(1);
  });
});

describe("SidecarServer with requests", () => {
  test("gives the engine the prompt's tokens and sends its text, counts and end", async () => {
    const { server, engine, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(7, { sampling: { maxTokens: 5, seed: 11 } }));
    await watch.until(() => engine.requests.length === 1);
    const request = engine.requests[0]!;
    expect(request).toMatchObject({ choiceCount: 1, maxTokens: 5, sampling: { seed: 11 } });
    expect(request.deadlineAtMs - request.receivedAtMs).toBe(60_000);
    expect(Array.from(request.tokens)).toEqual(Array.from(fakeTokenizer().encode("<start>hi")));
    server.applyEvents(tokenEvent(request.id, "ab"));
    server.applyEvents([...tokenEvent(request.id, "c"), finishEvent(request, 3)]);
    const done = await edge.frame(FrameType.done);
    expect(done).toMatchObject([FrameType.done, 7, { tokenCount: 3, finishReasons: ["length"] }]);
    const deltas = edge.frames.filter(([type]) => type === FrameType.delta);
    expect(deltas).toEqual([
      [FrameType.delta, [[7, 0, "ab", 2, null]]],
      [FrameType.delta, [[7, 0, "c", 1, null]]],
    ]);
    server.applyEvents(tokenEvent(request.id, "late"));
    await edge.expectAlive(1);
    expect(edge.frames.filter(([type]) => type === FrameType.delta).length).toBe(2);
  });

  test("answers what cannot work with an error on the stream", async () => {
    const { server, engine } = startServer();
    const edge = await greeted(server);
    const long = (length: number) => ({ messages: [{ role: "user" as const, content: "x".repeat(length) }] });
    const cases: [EdgeFrame, string, string][] = [
      [submit(1, { model: "other" }), "invalid_request", "this sidecar serves tiny, not other"],
      [submit(2, { messages: [{ role: "user", content: "refused" }] }), "invalid_request", "chat template refused"],
      [submit(3, { ...long(64), truncation: "disabled" }), "context_length_exceeded", "length is 64 tokens, but"],
      [submit(4, { sampling: { logitBias: [[MODEL.vocabSize, 1]] } }), "invalid_request", "logit_bias names token"],
      [submit(5, long(64 * 256 + 1)), "context_length_exceeded", "16385 characters. At most 16384 are"],
    ];
    for (const [frame, code, message] of cases) {
      edge.send(frame);
      await edge.until(() => edge.frames.some(([type, stream]) => type === FrameType.error && stream === frame[1]));
      const error = edge.frames.find(([type, stream]) => type === FrameType.error && stream === frame[1])!;
      expect(error[2] as unknown).toBe(code);
      expect(error[3] as unknown).toContain(message);
    }
    expect(engine.requests).toEqual([]);
    expect(edge.closed).toBe(null);
  });

  test("takes a prompt of many context windows, and encodes none that is longer than it takes", async () => {
    const { server, engine, watch, gate } = startServer();
    const edge = await greeted(server);
    // Its encoding would wait for the gate.
    edge.send(submit(1, { messages: [{ role: "user", content: "wait".repeat(64 * 64 + 1) }] }));
    expect(await edge.frame(FrameType.error)).toContain("context_length_exceeded");
    gate.open();
    edge.send(submit(2, { messages: [{ role: "user", content: "x".repeat(64 * 256) }] }));
    await watch.until(() => engine.requests.length === 1);
    expect(engine.requests[0]!.tokens.length).toBe(1 + 64 * 256);
  });

  test("refuses more requests than it may hold, and takes one again when one has ended", async () => {
    const { server, engine, watch } = startServer({ maxRequests: 2 });
    const edge = await greeted(server);
    edge.send(submit(1), submit(2));
    await watch.until(() => engine.requests.length === 2);
    edge.send(submit(3));
    expect(await edge.frame(FrameType.error)).toMatchObject([FrameType.error, 3, "queue_full", expect.any(String), 1]);
    server.applyEvents([finishEvent(engine.requests[0]!, 0)]);
    edge.send(submit(3));
    await watch.until(() => engine.requests.length === 3);
  });

  test("a stream number in use closes the connection and aborts its requests", async () => {
    const { server, engine, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1));
    await watch.until(() => engine.requests.length === 1);
    edge.send(submit(1));
    expect(await edge.closing()).toEqual({ code: CloseCode.outOfOrder, reason: "stream 1 is in use" });
    await watch.until(() => engine.aborts.length === 1);
    expect(engine.aborts).toEqual([{ request: engine.requests[0]!.id, choice: null, reason: "abort" }]);
  });

  test("aborts in the engine what an edge aborts or leaves behind, and nothing of others", async () => {
    const { server, engine, watch } = startServer();
    const [edge, other] = [await greeted(server), await greeted(server)];
    edge.send(submit(1), submit(2));
    await watch.until(() => engine.requests.length === 2);
    other.send(submit(1));
    await watch.until(() => engine.requests.length === 3);
    edge.send([FrameType.abort, 2], [FrameType.abort, 2], [FrameType.abort, 77]);
    await watch.until(() => engine.aborts.length === 1);
    edge.socket.close();
    await watch.until(() => engine.aborts.length === 2);
    expect(engine.aborts.map(({ request }) => request)).toEqual([engine.requests[1]!.id, engine.requests[0]!.id]);
    await other.expectAlive(1);
  });

  test("what is aborted while it is prepared never reaches the engine", async () => {
    const { server, engine, gate, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1, { messages: [{ role: "user", content: "wait" }] }), [FrameType.abort, 1]);
    await edge.expectAlive(1);
    gate.open();
    edge.send(submit(2));
    await watch.until(() => engine.requests.length > 0);
    expect(engine.requests.map(({ tokens }) => tokens.length)).toEqual([3]);
  });

  test("a late failure of an aborted stream does not touch the next one of its number", async () => {
    const { server, engine, gate, watch } = startServer();
    const edge = await greeted(server);
    const tooLong = `wait${"x".repeat(64)}`;
    edge.send(submit(1, { messages: [{ role: "user", content: tooLong }] }), [FrameType.abort, 1]);
    edge.send(submit(1, { messages: [{ role: "user", content: "wait" }] }));
    await edge.expectAlive(1);
    gate.open();
    await watch.until(() => engine.requests.length === 1);
    server.applyEvents([...tokenEvent(engine.requests[0]!.id, "x"), finishEvent(engine.requests[0]!, 1)]);
    await edge.frame(FrameType.done);
    expect(edge.frames.filter(([type]) => type === FrameType.error)).toEqual([]);
  });

  test("a stop string ends the choice in the engine", async () => {
    const { server, engine, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1, { sampling: { stop: ["b"], n: 2 } }));
    await watch.until(() => engine.requests.length === 1);
    const { id } = engine.requests[0]!;
    server.applyEvents([...tokenEvent(id, "a"), ...tokenEvent(id, "xbz", 1)]);
    expect(engine.aborts).toEqual([{ request: id, choice: 1, reason: "stop" }]);
    const delta = await edge.frame(FrameType.delta);
    expect(delta[1] as unknown).toEqual([[1, 0, "a", 1, null], [1, 1, "x", 2, null]]);
  });

  test("a failed request ends with an error and frees its stream", async () => {
    const { server, engine, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1));
    await watch.until(() => engine.requests.length === 1);
    const request = engine.requests[0]!.id;
    const late = { code: "deadline_exceeded", message: "late", retryAfterS: null } as const;
    server.applyEvents([{ type: "fail", request, ...late, blockIds: [] }]);
    expect(await edge.frame(FrameType.error)).toEqual([FrameType.error, 1, "deadline_exceeded", "late", null]);
    edge.send(submit(1));
    await watch.until(() => engine.requests.length === 2);
  });

  test("the next turn has the ids of the last answer", async () => {
    const { server, engine, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1));
    await watch.until(() => engine.requests.length === 1);
    const request = engine.requests[0]!;
    const tokens = Int32Array.from([...request.tokens, 1000 + 97 * 256 + 98]);
    const pair = { ...tokenEvent(request.id, "a")[0]!, token: tokens.at(-1)! } as EngineEvent;
    server.applyEvents([pair, { ...finishEvent(request, 1), tokens } as EngineEvent]);
    await edge.frame(FrameType.done);
    edge.send(submit(2, { messages: [{ role: "user", content: "hi" }, { role: "assistant", content: "ab<end>" }] }));
    await watch.until(() => engine.requests.length === 2);
    expect(Array.from(engine.requests[1]!.tokens)).toEqual([...tokens, 2]);
  });

  test("answers statistics and pings", async () => {
    const edge = await greeted(startServer().server);
    edge.send([FrameType.statsRequest, 3]);
    const stats = await edge.frame(FrameType.stats);
    const server = { activeRequests: 0, connections: 1, lineageFailures: 0, holdingsFailures: 0 };
    expect(stats).toEqual([FrameType.stats, 3, { steps: 3, ...server }]);
    await edge.expectAlive(42);
  });
});
