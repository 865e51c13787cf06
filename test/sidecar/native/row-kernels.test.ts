// Operations that act on one row at a time, against doubles, for sizes with and without a ragged end.

import { describe, expect, test } from "bun:test";
import { type DeviceAddress, type Isa, NO_ADDRESS } from "../../../sidecar/native.ts";
import { type FloatDtype, ISAS, normals, OperationDevice, rounded, rowsOf } from "../../support/operation-device.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const SIZES = [1, 2, 15, 16, 17, 64, 100, 384, 1000];
const ROWS = 3;
const NO_BLOCKS = new Int32Array(40).fill(-1);

/** Largest |actual - expected|, as a share of 1 + |expected|. */
function worst(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  expect(actual.length).toBe(expected.length);
  let most = 0;
  for (let i = 0; i < actual.length; i++) {
    most = Math.max(most, Math.abs(actual[i]! - expected[i]!) / (1 + Math.abs(expected[i]!)));
  }
  return most;
}

function byRow(x: Float32Array, size: number, apply: (row: Float32Array) => ArrayLike<number>): number[] {
  const result: number[] = [];
  for (let at = 0; at < x.length; at += size) result.push(...Array.from(apply(x.subarray(at, at + size))));
  return result;
}

/** Abramowitz and Stegun 7.1.5, the series; good to 1e-15 for |x| < 5. */
function erf(x: number): number {
  if (Math.abs(x) > 5) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 1; n < 120; n++) {
    term *= (-x * x) / n;
    sum += term / (2 * n + 1);
  }
  return (2 / Math.sqrt(Math.PI)) * sum;
}

describe.each(ISAS)("on %s", (isa: Isa) => {
  const seed = testSeed();

  test(`an RMS norm is that of doubles (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    using operations = new OperationDevice({ isa });
    for (const size of SIZES) {
      const [x, weight] = [normals(random, ROWS * size), normals(random, size)];
      const expected = byRow(x, size, (row) => {
        const mean = row.reduce((sum, value) => sum + value * value, 0) / size;
        return row.map((value, i) => (value / Math.sqrt(mean + 1e-5)) * weight[i]!);
      });
      const y = operations.poisoned(ROWS * size);
      operations.device.rmsNorm({
        y, x: operations.place(x), weight: operations.place(weight), rowCount: ROWS, size, epsilon: 1e-5,
      });
      expect(worst(operations.read(y, ROWS * size), expected)).toBeLessThan(1e-6);
    }
  });

  test(`a layer norm is that of doubles, with a bias and without, far from zero too (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    using operations = new OperationDevice({ isa });
    for (const size of SIZES) {
      for (const hasBias of [false, true]) {
        // Two values may lie so close together that their difference has few digits left.
        const [shift, tolerance] = size < 15 ? [0, 2e-4] : [30, 2e-5];
        const x = normals(random, ROWS * size).map((value) => value + shift);
        const [weight, bias] = [normals(random, size), normals(random, size)];
        const expected = byRow(x, size, (row) => {
          const mean = row.reduce((sum, value) => sum + value, 0) / size;
          const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / size;
          return Array.from(row, (value, i) => {
            return ((value - mean) / Math.sqrt(variance + 1e-5)) * weight[i]! + (hasBias ? bias[i]! : 0);
          });
        });
        const y = operations.poisoned(ROWS * size);
        operations.device.layerNorm({
          y,
          x: operations.place(x),
          weight: operations.place(weight),
          bias: hasBias ? operations.place(bias) : NO_ADDRESS,
          rowCount: ROWS,
          size,
          epsilon: 1e-5,
        });
        expect(worst(operations.read(y, ROWS * size), expected)).toBeLessThan(tolerance);
      }
    }
  });

  test("silu(gate) * up and gelu are those of doubles, from one end of the floats to the other", () => {
    using operations = new OperationDevice({ isa });
    const gate = Float32Array.from({ length: 1200 }, (_, i) => (i - 600) / 8);
    gate.set([0, -0, 1e-30, -1e-30, 1e30, -1e30]);
    const size = gate.length;
    const up = Float32Array.from({ length: size }, (_, i) => 1 + (i % 3));
    const x = new Float32Array(2 * size);
    x.set(gate);
    x.set(up, size);
    const y = operations.poisoned(size);
    operations.device.siluMul({ y, x: operations.place(x), rowCount: 1, size });
    const silu = Array.from(gate, (value, i) => (value / (1 + Math.exp(-value))) * up[i]!);
    expect(worst(operations.read(y, size), silu)).toBeLessThan(1e-6);

    const inPlace = operations.place(gate);
    operations.device.gelu({ y: inPlace, x: inPlace, rowCount: 1, size });
    const gelu = Array.from(gate, (value) => 0.5 * value * (1 + erf(value / Math.SQRT2)));
    expect(worst(operations.read(inPlace, size), gelu)).toBeLessThan(1e-6);
  });

  test("NaN goes through silu and gelu, and stays in its place", () => {
    using operations = new OperationDevice({ isa });
    const size = 37;
    const x = new Float32Array(2 * size).fill(1);
    x[20] = NaN;
    const run = (operation: (y: DeviceAddress, x: DeviceAddress) => void): number[] => {
      const y = operations.poisoned(size);
      operation(y, operations.place(x));
      return [...operations.read(y, size).keys()].filter((i) => Number.isNaN(operations.read(y, size)[i]));
    };
    expect(run((y, from) => operations.device.siluMul({ y, x: from, rowCount: 1, size }))).toEqual([20]);
    expect(run((y, from) => operations.device.gelu({ y, x: from, rowCount: 1, size }))).toEqual([20]);
  });

  for (const dtype of ["f32", "f16", "bf16"] as const satisfies readonly FloatDtype[]) {
    test(`an embedding of ${dtype} gives back the weight's rows (SEED=${seed})`, () => {
      const random = new SeededRandom(seed);
      const [vocabSize, hiddenSize] = [77, 35];
      using operations = new OperationDevice({ isa, vocabSize, hiddenSize });
      const { device } = operations;
      const table = rounded(normals(random, vocabSize * hiddenSize), dtype);
      const weight = operations.weight(vocabSize, hiddenSize, dtype, table);
      const ids = Int32Array.from({ length: 40 }, () => random.integer(0, vocabSize - 1));
      device.writeTokens(2, 5, ids);
      operations.begin([rowsOf(2, 5, ids.length, NO_BLOCKS)]);
      const y = operations.poisoned(ids.length * hiddenSize);
      device.embed({ y, weight, rowCount: ids.length });
      const expected = Array.from(ids, (id) => [...table.subarray(id * hiddenSize, (id + 1) * hiddenSize)]).flat();
      expect([...operations.read(y, ids.length * hiddenSize)]).toEqual(expected);
    });
  }
});

test("rows that want logits are gathered in the order of the sequences", () => {
  using operations = new OperationDevice();
  const size = 5;
  const logits = (rowCount: number, slot: number, wanted: "last" | "all") => ({
    ...rowsOf(slot, 3, rowCount, NO_BLOCKS), logits: wanted,
  });
  operations.begin([logits(2, 0, "all"), rowsOf(1, 0, 3, NO_BLOCKS), logits(4, 2, "last")]);
  const x = Float32Array.from({ length: 9 * size }, (_, i) => i);
  const y = operations.poisoned(3 * size);
  operations.device.gatherLogitRows({ y, x: operations.place(x), logitCount: 3, size });
  expect([...operations.read(y, 3 * size)]).toEqual([...x.subarray(0, 2 * size), ...x.subarray(8 * size)]);
});
