// The checksum of blocks: whatever rot and torn writes do to a block shows.

import { afterAll, expect, test } from "bun:test";
import type { HostAddress } from "../../../sidecar/native.ts";
import { cpuLibrary } from "../../support/cpu-library.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";
import { openTinyDevice } from "../../support/tiny-device.ts";

const BYTES = 8192;
const device = openTinyDevice();
const buffer = device.allocHost(BYTES + 64);
const memory = new Uint8Array(buffer.bytes, 0, BYTES);
afterAll(() => device.close());

function sum(bytes = BYTES, offset = 0): bigint {
  return cpuLibrary.checksum((buffer.address + offset) as HostAddress, bytes);
}

const seed = testSeed();

function fillRandomly(random: SeededRandom): void {
  for (let i = 0; i < BYTES; i++) memory[i] = random.integer(0, 255);
}

test(`changes with every single bit, of data and of zeros (SEED=${seed})`, () => {
  for (const isZero of [true, false]) {
    if (isZero) memory.fill(0);
    else fillRandomly(new SeededRandom(seed));
    const seen = new Set([sum()]);
    for (let bit = 0; bit < BYTES * 8; bit++) {
      memory[bit >> 3]! ^= 1 << (bit & 7);
      seen.add(sum());
      memory[bit >> 3]! ^= 1 << (bit & 7);
    }
    expect(seen.size).toBe(BYTES * 8 + 1);
  }
});

test(`changes when sectors are swapped, lost, doubled or zeroed (SEED=${seed})`, () => {
  fillRandomly(new SeededRandom(seed));
  const whole = memory.slice();
  const seen = new Set([sum()]);
  let count = 1;
  const note = (change: () => void): void => {
    memory.set(whole);
    change();
    seen.add(sum());
    count++;
  };
  for (const unit of [8, 128, 512, 4096]) {
    for (let at = 0; at + 2 * unit <= BYTES; at += unit) {
      const [first, second] = [whole.subarray(at, at + unit), whole.subarray(at + unit, at + 2 * unit)];
      note(() => {
        memory.set(second, at);
        memory.set(first, at + unit);
      });
      note(() => memory.set(first, at + unit));
      note(() => memory.fill(0, at, at + unit));
    }
  }
  expect(seen.size).toBe(count);
});

test("depends on the length, also of zeros, and not on where the bytes lie", () => {
  memory.fill(0);
  expect(new Set(Array.from({ length: BYTES }, (_, i) => sum(i + 1))).size).toBe(BYTES);
  fillRandomly(new SeededRandom(seed));
  const aligned = sum(1000);
  memory.copyWithin(13, 0, 1000);
  expect(sum(1000, 13)).toBe(aligned);
});

test("is the same in every library and version: blocks outlive both", () => {
  for (let i = 0; i < BYTES; i++) memory[i] = (i * 31 + 7) & 255;
  expect([sum(1), sum(128), sum(4096), sum()].map((value) => value.toString(16))).toMatchInlineSnapshot(`
    [
      "29d823a816d1bec9",
      "1ea7475666646978",
      "a657cf5445a45c9b",
      "1a1f629ad7f54a21",
    ]
  `);
});
