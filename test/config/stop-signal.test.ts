// One wish to stop that arrives several times, and a second wish.

import { afterEach, beforeEach, expect, spyOn, test } from "bun:test";
import process from "node:process";
import { listenForStop } from "../../config/stop-signal.ts";

const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
let before: ReadonlySet<unknown>;
let nowMs = 0;
let clock: ReturnType<typeof spyOn>;

beforeEach(() => {
  before = new Set(SIGNALS.flatMap((signal) => process.listeners(signal)));
  clock = spyOn(performance, "now").mockImplementation(() => nowMs);
});

afterEach(() => {
  clock.mockRestore();
  for (const signal of SIGNALS) {
    for (const listener of process.listeners(signal)) if (!before.has(listener)) process.off(signal, listener);
  }
});

test("a hang-up is none for a program that `nohup` may protect", () => {
  const count = process.listenerCount("SIGHUP");
  listenForStop(false);
  expect(process.listenerCount("SIGHUP")).toBe(count);
  const { orderly } = listenForStop(false, ["SIGHUP"]);
  process.emit("SIGHUP");
  expect(orderly.aborted).toBe(true);
});

test("who started it is gone, and a signal follows: that is one wish", () => {
  nowMs = 50_000;
  const { orderly, atOnce } = listenForStop(true);
  process.stdin.emit("end");
  expect(orderly.aborted).toBe(true);
  nowMs++;
  process.emit("SIGTERM");
  expect(atOnce.aborted).toBe(false);
});

test("a signal counts once however often it comes within a moment, and again after a pause", () => {
  const { orderly, atOnce } = listenForStop(false);
  expect(orderly.aborted).toBe(false);
  const seen = [1000, 1001, 2000, 2001].map((time) => {
    nowMs = time;
    process.emit(time === 1001 ? "SIGTERM" : "SIGINT");
    return [orderly.aborted, atOnce.aborted];
  });
  expect(seen).toEqual([[true, false], [true, false], [true, false], [true, true]]);
});
