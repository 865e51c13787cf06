// How fast something goes, from measurements of which some were disturbed.

import { describe, expect, test } from "bun:test";
import { RateMeter } from "../../../sidecar/kvcache/rate-meter.ts";

const RATE = 50;

/** Notes `count` transfers of one size one behind the other. */
function noteMany(meter: RateMeter, count: number, rate: number, startMs: number): number {
  let endMs = startMs;
  for (let i = 0; i < count; i++) {
    const beginMs = endMs;
    endMs += (RATE * 10) / rate;
    meter.note(RATE * 10, beginMs, endMs);
  }
  return endMs;
}

describe("RateMeter", () => {
  test("says nothing before it has measured", () => {
    const meter = new RateMeter();
    expect(meter.perMs).toBe(null);
    expect(meter.expectedMs(10)).toBe(null);
    meter.note(0, 0, 5);
    meter.note(10, 5, 5);
    expect(meter.perMs).toBe(null);
  });

  test("one transfer that was held up, the first one too, changes nothing for long", () => {
    const meter = new RateMeter();
    meter.note(RATE * 10, 0, 60);
    const endMs = noteMany(meter, 2, RATE, 100);
    expect(meter.perMs).toBe(RATE);
    meter.note(RATE * 10, endMs, endMs + 500);
    expect(meter.expectedMs(RATE * 4)).toBe(4);
  });

  test("what ends at once was moved at once", () => {
    const meter = new RateMeter();
    for (let round = 0; round < 5; round++) {
      for (let i = 0; i < 4; i++) meter.note(RATE * 2, round * 8, round * 8 + 8);
    }
    expect(meter.perMs).toBe(RATE);
  });

  test("and what ends a moment later, as good as", () => {
    const meter = new RateMeter();
    for (let round = 1; round <= 5; round++) {
      meter.note(RATE * 5, round * 10 - 10, round * 10);
      meter.note(RATE * 5, round * 10 - 10, round * 10 + 0.01);
    }
    expect(meter.perMs! / RATE).toBeGreaterThan(0.99);
    expect(meter.perMs! / RATE).toBeLessThan(1.01);
  });

  test("a long burst of transfers beside one another does not hide that they slow down", () => {
    const meter = new RateMeter();
    let endMs = 0;
    const burst = (count: number, eachMs: number) => {
      for (let i = 0; i < count; i++) meter.note(1, endMs - 1, (endMs += eachMs));
    };
    burst(10_000, 0.1);
    burst(200, 0.9);
    expect(meter.perMs!).toBeGreaterThan(1);
    expect(meter.perMs!).toBeLessThan(1.3);
  });

  test("a short transfer on its own counts", () => {
    const meter = new RateMeter();
    meter.note(RATE / 2, 0, 0.5);
    meter.note(RATE / 2, 3, 3.5);
    expect(meter.perMs).toBe(RATE);
  });

  test("small transfers, which take as long as their start, do not count beside large ones", () => {
    const meter = new RateMeter();
    const endMs = noteMany(meter, 3, RATE, 0);
    for (let i = 0; i < 6; i++) meter.note(RATE / 4, endMs + i * 10, endMs + i * 10 + 1);
    expect(meter.perMs).toBe(RATE);
  });

  test("a large one that was held up changes nothing, among smaller ones either", () => {
    const meter = new RateMeter();
    const endMs = noteMany(meter, 2, RATE, 0);
    meter.note(RATE * 1000, endMs, endMs + 4000);
    expect(meter.perMs).toBe(RATE);
    noteMany(meter, 6, RATE, endMs + 4000);
    expect(meter.perMs).toBe(RATE);
  });

  test("follows what slows down for good", () => {
    const meter = new RateMeter();
    const endMs = noteMany(meter, 20, RATE, 0);
    noteMany(meter, 5, RATE / 4, endMs);
    expect(meter.perMs).toBe(RATE / 4);
  });
});
