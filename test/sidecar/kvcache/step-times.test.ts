// A step's time by its rows, from noisy measurements.

import { describe, expect, test } from "bun:test";
import { StepTimes } from "../../../sidecar/kvcache/step-times.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

describe("StepTimes", () => {
  test("says nothing before it has measured", () => {
    expect(new StepTimes().expectedMs(10)).toBe(null);
    expect(new StepTimes().msPerRow).toBe(null);
  });

  test("finds the fixed part and the rows' part", () => {
    const times = new StepTimes();
    [1, 64, 2048, 1, 512].forEach((rows, i) => times.note(rows, i * 1000, i * 1000 + 5 + rows * 0.02));
    expect(times.expectedMs(128)).toBeCloseTo(5 + 128 * 0.02, 6);
    expect(times.msPerRow).toBeCloseTo(0.02, 6);
  });

  test("steps of one size alone are taken to be all rows", () => {
    const times = new StepTimes();
    for (let i = 0; i < 5; i++) times.note(100, i * 50, i * 50 + 20);
    expect(times.expectedMs(200)).toBeCloseTo(40, 6);
  });

  test("a step enqueued behind another has only the time after that one", () => {
    const times = new StepTimes();
    times.note(10, 0, 30);
    times.note(10, 5, 60);
    expect(times.expectedMs(10)).toBeCloseTo(30, 6);
  });

  const seed = testSeed();
  test(`never expects less than nothing, and follows a device that slows down (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    const times = new StepTimes();
    for (const slow of [1, 3]) {
      for (let i = 0; i < 600; i++) {
        const rows = random.integer(1, 600);
        const ms = slow * (4 + rows * 0.05) * (0.7 + 0.6 * random.next());
        times.note(rows, i * 1e6 * slow, i * 1e6 * slow + ms);
        for (const asked of [1, 1000]) expect(times.expectedMs(asked)!).toBeGreaterThanOrEqual(0);
      }
      const expected = slow * (4 + 300 * 0.05);
      expect(times.expectedMs(300)! / expected).toBeGreaterThan(0.85);
      expect(times.expectedMs(300)! / expected).toBeLessThan(1.15);
    }
  });
});
