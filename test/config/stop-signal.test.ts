// One wish to stop that arrives several times, and a second wish.

import { afterEach, beforeEach, expect, spyOn, test } from "bun:test";
import process from "node:process";
import { listenForStop } from "../../config/stop-signal.ts";

const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
let before: ReadonlySet<unknown>;
let nowMs = 0;
const clock = spyOn(performance, "now");

beforeEach(() => {
  before = new Set(SIGNALS.flatMap((signal) => process.listeners(signal)));
  clock.mockImplementation(() => nowMs);
});

afterEach(() => {
  clock.mockRestore();
  for (const signal of SIGNALS) {
    for (const listener of process.listeners(signal)) if (!before.has(listener)) process.off(signal, listener);
  }
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
