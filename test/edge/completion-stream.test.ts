// Merging of deltas, the count at the end, and what an abort tells the sidecar.

import { describe, expect, test } from "bun:test";
import { CompletionAborted, CompletionStream } from "../../edge/completion-stream.ts";
import type { Done, TokenLogprob } from "../../sidecar/protocol.ts";
import { cacheReport } from "../support/cache-report.ts";

const done = (tokenCount: number): Done => ({
  usage: { promptTokens: 1, completionTokens: tokenCount, cachedTokens: { gpu: 0, host: 0, disk: 0 } },
  timings: { queueMs: 0, loadMs: 0, prefillMs: 0, ttftMs: 0, totalMs: 0 },
  cache: cacheReport(),
  finishReasons: ["stop"],
  tokenCount,
  missReasons: {},
});

const logprob = (token: string): TokenLogprob => ({ token, bytes: [], logprob: -1, top: [] });

function open() {
  const calls = { aborts: 0 };
  return { calls, stream: new CompletionStream(() => calls.aborts++) };
}

describe("CompletionStream", () => {
  test("merges what nobody has taken, choice by choice", async () => {
    const { stream } = open();
    stream.push([1, 0, "a", 1, [logprob("a")]]);
    stream.push([1, 1, "x", 1, null]);
    stream.push([1, 0, "b", 2, [logprob("b")]]);
    stream.finish(done(4));
    expect(await stream.next()).toEqual({
      type: "deltas",
      deltas: [
        { choice: 0, text: "ab", tokenCount: 3, logprobs: [logprob("a"), logprob("b")] },
        { choice: 1, text: "x", tokenCount: 1, logprobs: null },
      ],
    });
    expect(await stream.next()).toEqual({ type: "done", done: done(4) });
  });

  test("wakes who waits", async () => {
    const { stream } = open();
    const next = stream.next();
    stream.push([1, 0, "a", 1, null]);
    expect((await next).type).toBe("deltas");
  });

  test("does not believe an end whose count is another", async () => {
    const { stream } = open();
    stream.push([1, 0, "a", 1, null]);
    stream.finish(done(2));
    await stream.next();
    await expect(stream.next()).rejects.toMatchObject({ code: "sidecar_lost", status: 503 });
  });

  test("gives out what came before an error, then the error", async () => {
    const { stream } = open();
    stream.push([1, 0, "a", 1, null]);
    stream.fail(new Error("broken"));
    expect((await stream.next()).type).toBe("deltas");
    await expect(stream.next()).rejects.toThrow("broken");
  });

  test("tells the sidecar of an abort once, and not after the end", async () => {
    const { calls, stream } = open();
    stream.push([1, 0, "a", 1, null]);
    stream.abort();
    stream.abort();
    stream.push([1, 0, "late", 1, null]);
    await expect(stream.next()).rejects.toThrow(CompletionAborted);
    expect(calls.aborts).toBe(1);
    const ended = open();
    ended.stream.finish(done(0));
    ended.stream.abort();
    expect(ended.calls.aborts).toBe(0);
  });
});
