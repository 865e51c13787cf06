// Deletes on the sidecar: what a conversation leaves behind goes, what another one holds stays, whatever the
// conversation is doing at that moment.

import { afterEach, describe, expect, test } from "bun:test";
import { Forgetter } from "../../sidecar/forgetter.ts";
import { conversationKey, Holdings } from "../../sidecar/holdings.ts";
import { type EdgeFrame, FrameType } from "../../sidecar/protocol.ts";
import { byteToken } from "../support/fake-tokenizer.ts";
import {
  cleanUp, type Edge, finishEvent, greeted, onCleanup, startServer, submit, tokenEvent,
} from "../support/sidecar-server.ts";
import { submitRequest } from "../support/submit-request.ts";

afterEach(cleanUp);

const SALT = new Uint8Array(32);
const forget = (stream: number, conversation: string, salt = SALT): EdgeFrame => [
  FrameType.forget, stream, salt, conversation,
];

type Server = ReturnType<typeof startServer>;

/** One whole turn of a conversation, which leaves these blocks. */
async function turn(parts: Server, edge: Edge, stream: number, conversation: string | null, blockIds: string[]) {
  const { engine, server, watch } = parts;
  const before = engine.requests.length;
  edge.send(submit(stream, { conversation, messages: [{ role: "user", content: `hi${conversation}` }] }));
  await watch.until(() => engine.requests.length > before);
  const request = engine.requests.at(-1)!;
  const tokens = Int32Array.from([...request.tokens, byteToken("x".charCodeAt(0))]);
  server.applyEvents([...tokenEvent(request.id, "x"), { ...finishEvent(request, 1, { blockIds }), tokens }]);
  await edge.until(() => edge.frames.some(([type, each]) => type === FrameType.done && each === stream));
}

async function forgotten(edge: Edge, stream: number): Promise<unknown> {
  await edge.until(() => edge.frames.some(([type, each]) => type === FrameType.forgotten && each === stream));
  return edge.frames.find(([type, each]) => type === FrameType.forgotten && each === stream)![2];
}

describe("a delete", () => {
  test("takes the blocks that no other conversation holds, and says how many by tier", async () => {
    const parts = startServer();
    const edge = await greeted(parts.server);
    await turn(parts, edge, 1, "a", ["shared", "a1"]);
    await turn(parts, edge, 2, "a", ["shared", "a1", "a2"]);
    await turn(parts, edge, 3, "b", ["shared", "b1"]);
    await turn(parts, edge, 4, null, ["shared", "nobody's"]);
    edge.send(forget(5, "a"));
    expect(await forgotten(edge, 5)).toEqual({ gpu: 2, disk: 1 });
    edge.send(forget(6, "b"));
    expect(await forgotten(edge, 6)).toEqual({ gpu: 2, disk: 1 });
    expect(parts.engine.forgotten).toEqual([["a1", "a2"], ["b1", "shared"]]);
  });

  test("finds the blocks of a turn of which only the beginning was ever heard", async () => {
    const parts = startServer();
    const edge = await greeted(parts.server);
    edge.send(submit(1, { conversation: "a" }), submit(2, { conversation: null }));
    await parts.watch.until(() => parts.engine.requests.length === 2);
    const [held, free] = parts.engine.requests;
    expect([held!.isHeld, free!.isHeld]).toEqual([true, false]);
    parts.server.applyEvents([{ type: "begun", request: held!.id, blockIds: ["p1", "p2"] }]);
    const key = conversationKey(SALT, "a");
    expect(parts.holdings.heldAlone(key).blocks.toSorted()).toEqual(["p1", "p2"]);
    // One that was given up meanwhile is heard, too.
    edge.send([FrameType.abort, 1]);
    await parts.watch.until(() => parts.engine.aborts.length > 0);
    parts.server.applyEvents([{ type: "begun", request: held!.id, blockIds: ["p1", "p2", "p3"] }]);
    expect(parts.holdings.heldAlone(key).blocks.toSorted()).toEqual(["p1", "p2", "p3"]);
  });

  test("of another account's conversation of the same name ends none of its turns, and waits for none", async () => {
    const parts = startServer();
    const edge = await greeted(parts.server);
    edge.send(submit(1, { conversation: "a" }), submit(2, { conversation: "a" }));
    await parts.watch.until(() => parts.engine.requests.length === 2);
    edge.send([FrameType.abort, 2]); // it is leaving; the engine has not answered yet
    await parts.watch.until(() => parts.engine.aborts.length > 0);
    edge.send(forget(3, "a", new Uint8Array(32).fill(1)));
    expect(await forgotten(edge, 3)).toEqual({});
    expect(edge.frames.some(([type, stream]) => type === FrameType.error && stream === 1)).toBe(false);
    expect(parts.engine.aborts.length).toBe(1);
  });

  test("of a conversation that nobody knows, or of another account's, takes nothing", async () => {
    const parts = startServer();
    const edge = await greeted(parts.server);
    await turn(parts, edge, 1, "a", ["a1"]);
    edge.send(forget(2, "unknown"), forget(3, "a", new Uint8Array(32).fill(1)));
    expect(await forgotten(edge, 2)).toEqual({});
    expect(await forgotten(edge, 3)).toEqual({});
    expect(parts.engine.forgotten).toEqual([]);
  });

  test("takes the text's ids, so that the same text is encoded anew", async () => {
    const parts = startServer();
    const edge = await greeted(parts.server);
    await turn(parts, edge, 1, "a", ["a1"]);
    const nothing = async () => new Int32Array(1);
    const known = async () => (await parts.lineage.resolve(SALT, "<start>hiax", nothing)).knownTokens;
    expect(await known()).toBeGreaterThan(0);
    edge.send(forget(2, "a"));
    await forgotten(edge, 2);
    expect(await known()).toBe(0);
  });

  test("ends a turn in progress, and takes what it leaves", async () => {
    const parts = startServer();
    const { engine, server, watch } = parts;
    const [edge, other] = [await greeted(server), await greeted(server)];
    await turn(parts, edge, 1, "a", ["a1"]);
    edge.send(submit(2, { conversation: "a", sampling: { n: 2 } }), submit(3, { conversation: "b" }));
    await watch.until(() => engine.requests.length === 3);
    const request = engine.requests[1]!;
    server.applyEvents(tokenEvent(request.id, "h"));
    other.send(forget(9, "a"));
    const error = await edge.frame(FrameType.error);
    expect(error).toEqual([FrameType.error, 2, "conversation_deleted", expect.any(String), null]);
    expect(engine.aborts).toEqual([{ request: request.id, choice: null, reason: "abort" }]);
    server.applyEvents([
      ...tokenEvent(request.id, "i"),
      finishEvent(request, 2, { reason: "abort", blockIds: ["a1", "a2"] }),
    ]);
    await other.expectAlive(1);
    expect(engine.forgotten).toEqual([]); // the other choice may still leave something
    server.applyEvents([finishEvent(request, 0, { choice: 1, reason: "abort", blockIds: ["a1", "a3"] })]);
    await forgotten(other, 9);
    expect(engine.forgotten).toEqual([["a1", "a2", "a3"]]);
    expect(edge.frames.some(([type, stream]) => type === FrameType.error && stream === 3)).toBe(false);
  });

  test("keeps a turn that is still being prepared from the engine", async () => {
    const { server, engine, gate, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1, { conversation: "a", messages: [{ role: "user", content: "wait" }] }), forget(2, "a"));
    expect((await edge.frame(FrameType.error)).slice(0, 3)).toEqual([FrameType.error, 1, "conversation_deleted"]);
    expect(await forgotten(edge, 2)).toEqual({});
    gate.open();
    edge.send(submit(3));
    await watch.until(() => engine.requests.length > 0);
    expect(engine.requests.map(({ tokens }) => tokens.length)).toEqual([3]);
  });

  test("finds what turns left that were aborted, or failed", async () => {
    const { server, engine, watch } = startServer();
    const edge = await greeted(server);
    edge.send(submit(1, { conversation: "a" }), submit(2, { conversation: "a" }));
    await watch.until(() => engine.requests.length === 2);
    const [first, second] = engine.requests;
    edge.send([FrameType.abort, 1]);
    await watch.until(() => engine.aborts.length === 1);
    const late = { code: "deadline_exceeded", message: "late", retryAfterS: null, blockIds: ["a2"] } as const;
    server.applyEvents([
      finishEvent(first!, 0, { reason: "abort", blockIds: ["a1"] }),
      { type: "fail", request: second!.id, ...late },
    ]);
    edge.send(forget(3, "a"));
    await forgotten(edge, 3);
    expect(engine.forgotten).toEqual([["a1", "a2"]]);
  });

  test("is not acknowledged when the engine could not do it, and takes all the next time", async () => {
    const parts = startServer();
    const edge = await greeted(parts.server);
    await turn(parts, edge, 1, "a", ["a1"]);
    const works = parts.engine.forget.bind(parts.engine);
    parts.engine.forget = async () => Promise.reject(new Error("the disk does not answer"));
    edge.send(forget(2, "a"));
    const error = await edge.frame(FrameType.error);
    expect(error).toEqual([FrameType.error, 2, "internal", "the disk does not answer", null]);
    parts.engine.forget = works;
    edge.send(forget(3, "a"));
    expect(await forgotten(edge, 3)).toEqual({ gpu: 1, disk: 1 });
  });
});

describe("Forgetter", () => {
  test("deletes the longest unused conversations when more is held than can be noted", async () => {
    const holdings = new Holdings({ path: ":memory:", maxItems: 4 });
    onCleanup(() => holdings.close());
    const removed: string[][] = [];
    const forgetter = new Forgetter({
      holdings,
      lineage: { remember: () => [], forget: () => {} },
      removeBlocks: async (ids) => {
        removed.push([...ids]);
        return {};
      },
    });
    const record = (conversation: string, ...blockIds: string[]) =>
      forgetter.record(submitRequest({ conversation }), { chains: [blockIds], lineage: null });
    record("a", "shared", "a1");
    record("b", "shared", "b1");
    expect(removed).toEqual([]);
    record("c", "c1");
    await forgetter.forget(SALT, "c"); // after whatever is under way
    expect(removed).toEqual([["a1"], ["c1"]]);
    expect(holdings.heldAlone(conversationKey(SALT, "b")).blocks.toSorted()).toEqual(["b1", "shared"]);
  });
});
