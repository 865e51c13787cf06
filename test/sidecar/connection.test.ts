// One edge's connection under load: an edge that reads slowly gets merged deltas, one that does not read is cut off,
// and a stop loses nothing that an edge still wants to read.

import { afterEach, describe, expect, test } from "bun:test";
import { connect as connectTcp, type Socket } from "node:net";
import type { EngineEvent } from "../../sidecar/engine/request.ts";
import { CloseCode, decodeSidecarFrame, encodeFrame, FrameType } from "../../sidecar/protocol.ts";
import type { SidecarServer } from "../../sidecar/server.ts";
import { LONG } from "../support/fake-tokenizer.ts";
import {
  cleanUp, finishEvent, greeted, HELLO, onCleanup, SECRET, startServer, submit, tokenEvent,
} from "../support/sidecar-server.ts";

afterEach(cleanUp);

/** A raw socket that speaks WebSocket just well enough not to read. */
async function rawEdge(url: string, streams: number): Promise<Socket> {
  const { port, host } = new URL(url);
  const socket = connectTcp(Number(port), "127.0.0.1");
  onCleanup(() => socket.destroy());
  socket.on("error", () => {}); // being cut off is what some tests are about
  socket.write(
    [
      "GET / HTTP/1.1", `Host: ${host}`, "Upgrade: websocket", "Connection: Upgrade",
      "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
      `Authorization: Bearer ${SECRET}`, "", "",
    ].join("\r\n"),
  );
  await new Promise((resolve) => socket.once("data", resolve));
  socket.pause();
  const frames = [HELLO, ...Array.from({ length: streams }, (_, i) => submit(i + 1))];
  for (const frame of frames) socket.write(maskedFrame(encodeFrame(frame)));
  return socket;
}

function maskedFrame(payload: Uint8Array): Buffer {
  const head = Buffer.from([0x82, 0x80 | 126, payload.length >> 8, payload.length & 255, 0, 0, 0, 0]);
  return Buffer.concat([head, payload]);
}

/** Of the binary frames of a server, which bear no masks. */
function* payloads(bytes: Buffer): Generator<Buffer> {
  for (let at = 0; at < bytes.length; ) {
    const short = bytes[at + 1]! & 127;
    const headBytes = short < 126 ? 2 : short === 126 ? 4 : 10;
    const length =
      short < 126 ? short : short === 126 ? bytes.readUInt16BE(at + 2) : Number(bytes.readBigUInt64BE(at + 2));
    if ((bytes[at]! & 15) === 2) yield bytes.subarray(at + headBytes, at + headBytes + length);
    at += headBytes + length;
  }
}

const STEPS = 400;

/** One long token per step: 25 MiB, several times what the kernel keeps for a socket that is not read. */
async function fill(server: SidecarServer, request: number): Promise<void> {
  const event: EngineEvent = { type: "token", request, choice: 0, token: LONG, logprob: -1, top: [] };
  for (let step = 0; step < STEPS; step++) {
    server.applyEvents([event]);
    await new Promise((resolve) => setImmediate(resolve)); // sockets get their turn, as between engine steps
  }
}

describe("a slow reader", () => {
  test("gets merged deltas, and every count is right once it has read", async () => {
    const { server, engine, watch } = startServer();
    const socket = await rawEdge(server.url, 2);
    await watch.until(() => engine.requests.length === 2);
    const [first, second] = engine.requests;
    await fill(server, first!.id);
    server.applyEvents([...tokenEvent(second!.id, "y"), finishEvent(second!, 1)]);
    server.applyEvents([finishEvent(first!, STEPS)]);
    const chunks: Buffer[] = [];
    const drained = server.drain(60_000);
    await new Promise((resolve) => {
      socket.on("data", (chunk) => chunks.push(chunk as Buffer));
      socket.once("close", resolve);
      socket.resume();
    });
    await drained;
    const frames = [...payloads(Buffer.concat(chunks))].map((payload) => decodeSidecarFrame(payload));
    const deltas = frames.flatMap((frame) => (frame[0] === FrameType.delta ? frame[1] : []));
    const count = (stream: number) =>
      deltas.filter(([each]) => each === stream).reduce((sum, [, , , tokens]) => sum + tokens, 0);
    const dones = frames.filter((frame) => frame[0] === FrameType.done);
    expect(dones.map((frame) => frame[1]).toSorted()).toEqual([1, 2]);
    expect([count(1), count(2)]).toEqual([STEPS, 1]);
    expect(deltas.filter(([stream]) => stream === 1).length).toBeLessThan(STEPS);
  });

  test("is cut off after its time, and its requests are aborted", async () => {
    const { server, engine, watch } = startServer({ slowEdgeTimeoutMs: 20 });
    const socket = await rawEdge(server.url, 1);
    await watch.until(() => engine.requests.length === 1);
    const cut = new Promise((resolve) => socket.once("close", resolve));
    await fill(server, engine.requests[0]!.id);
    await watch.until(() => engine.aborts.length === 1);
    expect(engine.aborts[0]!.request).toBe(engine.requests[0]!.id);
    socket.resume();
    await cut;
  });
});

describe("a drain", () => {
  test("waits for what is in progress, refuses what is new, then says goodbye", async () => {
    const { server, engine, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1));
    await watch.until(() => engine.requests.length === 1);
    const drained = server.drain(60_000);
    edge.send(submit(2));
    const error = await edge.frame(FrameType.error);
    expect(error).toEqual([FrameType.error, 2, "shutting_down", "the sidecar is shutting down", null]);
    server.applyEvents([...tokenEvent(engine.requests[0]!.id, "z"), finishEvent(engine.requests[0]!, 1)]);
    await drained;
    expect((await edge.closing()).code).toBe(CloseCode.shuttingDown);
    expect(edge.frames.some(([type]) => type === FrameType.done)).toBe(true);
  });

  test("gives up at its limit and aborts what is left", async () => {
    const { server, engine, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1));
    await watch.until(() => engine.requests.length === 1);
    await server.drain(1);
    expect((await edge.closing()).code).toBe(CloseCode.shuttingDown);
    expect(engine.aborts.length).toBe(1);
  });
});
