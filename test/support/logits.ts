// How logits are compared: per position against the reference within a share of its largest value, or bit for
// bit.

import { expect } from "bun:test";

/** Largest |a - b| of any position, as a share of the position's largest |b|. */
export function worstDeviation(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  vocabSize: number,
): number {
  expect(actual.length).toBe(expected.length);
  let worst = 0;
  for (let begin = 0; begin < expected.length; begin += vocabSize) {
    let difference = 0;
    let peak = 0;
    for (let i = begin; i < begin + vocabSize; i++) {
      // Math.max keeps a NaN once it has seen one.
      difference = Math.max(difference, Math.abs(actual[i]! - expected[i]!));
      peak = Math.max(peak, Math.abs(expected[i]!));
    }
    worst = Math.max(worst, difference / peak);
  }
  return worst;
}

export function expectSameBits(actual: Float32Array, expected: Float32Array): void {
  expect(actual.length).toBe(expected.length);
  const [a, b] = [bitsOf(actual), bitsOf(expected)];
  expect(a.findIndex((bits, i) => bits !== b[i])).toBe(-1);
}

function bitsOf(values: Float32Array): Uint32Array {
  return new Uint32Array(values.buffer, values.byteOffset, values.length);
}

export function joined(parts: readonly Float32Array[]): Float32Array {
  const whole = new Float32Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
