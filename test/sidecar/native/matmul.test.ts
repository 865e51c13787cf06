// Matrix products against doubles, over odd shapes, dtypes and instruction sets; and that a row's bits are its own.

import { describe, expect, test } from "bun:test";
import type { Isa } from "../../../sidecar/native.ts";
import { expectSameBits, joined } from "../../support/logits.ts";
import {
  type FloatDtype,
  ISAS,
  NO_ADDRESS,
  normals,
  OperationDevice,
  rounded,
} from "../../support/operation-device.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const MAX_ROWS = 600;
const DTYPES: readonly FloatDtype[] = ["f32", "f16", "bf16"];
/** [outputs, inputs] */
const SHAPES = [
  [1, 1],
  [31, 7],
  [33, 64],
  [64, 257],
  [100, 300],
  [513, 40],
] as const;
const ROW_COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 25, 241] as const;

interface Product {
  readonly x: Float32Array;
  readonly weights: Float32Array;
  readonly bias: Float32Array | null;
  readonly y: Float32Array | null;
}

/** Worst error in roundings (2^-24) of the sum of magnitudes. */
function worstError(actual: Float32Array, { x, weights, bias, y }: Product, outputs: number, inputs: number): number {
  const rows = x.length / inputs;
  expect(actual.length).toBe(rows * outputs);
  let worst = 0;
  for (let row = 0; row < rows; row++) {
    for (let output = 0; output < outputs; output++) {
      const at = row * outputs + output;
      const [start, offset] = [y?.[at] ?? 0, bias?.[output] ?? 0];
      let sum = start + offset;
      let magnitude = Math.abs(start) + Math.abs(offset);
      for (let i = 0; i < inputs; i++) {
        const product = x[row * inputs + i]! * weights[output * inputs + i]!;
        sum += product;
        magnitude += Math.abs(product);
      }
      // Math.max keeps a NaN.
      worst = Math.max(worst, Math.abs(actual[at]! - sum) / (magnitude * 2 ** -24));
    }
  }
  return worst;
}

function multiply(
  operations: OperationDevice,
  dtype: FloatDtype,
  product: Product,
  [outputs, inputs]: readonly [number, number],
): Float32Array {
  const { device } = operations;
  const rowCount = product.x.length / inputs;
  const weight = operations.weight(outputs, inputs, dtype, product.weights);
  const y = product.y === null ? operations.poisoned(rowCount * outputs) : operations.place(product.y);
  const x = operations.place(product.x);
  const bias = product.bias === null ? NO_ADDRESS : operations.place(product.bias);
  device.matmul({ y, x, weight, bias, rowCount, output: product.y === null ? "f32" : "added" });
  const result = operations.read(y, rowCount * outputs);
  for (const address of [x, y, bias]) if (address !== NO_ADDRESS) device.free(address);
  device.freeWeight(weight);
  return result;
}

function makeProduct(random: SeededRandom, rows: number, outputs: number, inputs: number, dtype: FloatDtype): Product {
  return {
    x: normals(random, rows * inputs),
    weights: rounded(normals(random, outputs * inputs), dtype),
    bias: random.next() < 0.5 ? normals(random, outputs) : null,
    y: random.next() < 0.5 ? normals(random, rows * outputs) : null,
  };
}

describe.each(ISAS)("a matrix product on %s", (isa: Isa) => {
  const seed = testSeed();

  for (const dtype of DTYPES) {
    test(`of ${dtype} weights is that of doubles, for odd shapes (SEED=${seed})`, () => {
      const random = new SeededRandom(seed);
      using operations = new OperationDevice({ isa, maxRows: MAX_ROWS, threadCount: 3 });
      for (const [outputs, inputs] of SHAPES) {
        for (const rows of ROW_COUNTS) {
          const product = makeProduct(random, rows, outputs, inputs, dtype);
          const actual = multiply(operations, dtype, product, [outputs, inputs]);
          // n additions may be off by n roundings of the whole; at random they are off by about the square root.
          expect(worstError(actual, product, outputs, inputs)).toBeLessThan(3 + 2 * Math.sqrt(inputs));
        }
      }
    });

    test(`of ${dtype} weights gives a row the same bits in any company, on any threads (SEED=${seed})`, () => {
      const random = new SeededRandom(seed);
      const [outputs, inputs, rows] = [200, 530, 300];
      const product = makeProduct(random, rows, outputs, inputs, dtype);
      using one = new OperationDevice({ isa, maxRows: MAX_ROWS, threadCount: 1 });
      const whole = multiply(one, dtype, product, [outputs, inputs]);
      for (const threadCount of [1, 4]) {
        using operations = new OperationDevice({ isa, maxRows: MAX_ROWS, threadCount });
        const parts: Float32Array[] = [];
        for (let row = 0; row < rows; ) {
          const count = Math.min(rows - row, random.next() < 0.5 ? random.integer(1, 9) : random.integer(10, 250));
          const part: Product = {
            ...product,
            x: product.x.slice(row * inputs, (row + count) * inputs),
            y: product.y?.slice(row * outputs, (row + count) * outputs) ?? null,
          };
          parts.push(multiply(operations, dtype, part, [outputs, inputs]));
          row += count;
        }
        expectSameBits(joined(parts), whole);
      }
    });
  }

  test("keeps NaN and infinities to their own outputs", () => {
    using operations = new OperationDevice({ isa });
    for (const rows of [1, 7, 40]) {
      const [outputs, inputs] = [70, 50];
      const random = new SeededRandom(1);
      const weights = normals(random, outputs * inputs);
      weights[3 * inputs + 4] = NaN;
      weights[40 * inputs] = Infinity;
      const x = normals(random, rows * inputs).map(Math.abs);
      const y = multiply(operations, "f32", { x, weights, bias: null, y: null }, [outputs, inputs]);
      y.forEach((value, at) => {
        const output = at % outputs;
        if (output === 3) expect(value).toBeNaN();
        else if (output === 40) expect(value).toBe(Infinity);
        else expect(Math.abs(value)).toBeLessThan(1000);
      });
    }
  });

  test("of weights that came in pieces and in another dtype is that of whole ones", () => {
    using operations = new OperationDevice({ isa });
    const { device } = operations;
    const [outputs, inputs] = [75, 20];
    const random = new SeededRandom(2);
    const weights = rounded(normals(random, outputs * inputs), "bf16");
    const x = normals(random, inputs);
    const whole = multiply(operations, "bf16", { x, weights, bias: null, y: null }, [outputs, inputs]);
    const weight = device.createWeight(outputs, inputs, "bf16");
    for (const [rowBegin, rowCount] of [[40, 35], [0, 3], [3, 37]] as const) {
      const rows = weights.slice(rowBegin * inputs, (rowBegin + rowCount) * inputs);
      const source = new Uint8Array(rows.buffer);
      device.uploadWeight({ weight, rowBegin, rowCount, source, sourceDtype: "f32" });
    }
    const y = operations.poisoned(outputs);
    const address = operations.place(x);
    device.matmul({ y, x: address, weight, bias: NO_ADDRESS, rowCount: 1, output: "f32" });
    expectSameBits(operations.read(y, outputs), whole);
  });
});

describe("made-up weights", () => {
  test("have the deviation that was asked for, and are the same on every instruction set", () => {
    const [rows, cols] = [256, 300];
    let first: Float32Array | null = null;
    for (const isa of ISAS) {
      using operations = new OperationDevice({ isa, vocabSize: rows, hiddenSize: cols, maxRows: rows });
      const { device } = operations;
      const weight = device.createWeight(rows, cols, "bf16");
      device.fillWeightRandom(weight, 7, 0.02);
      // Read back as the embedding of every token.
      device.writeTokens(0, 0, Int32Array.from({ length: rows }, (_, id) => id));
      operations.begin([
        { slot: 0, position: 0, rowCount: rows, blockTable: new Int32Array(40).fill(-1), logits: "none",
          sampling: null, promptLength: 0, rngPosition: 0 },
      ]);
      const y = operations.poisoned(rows * cols);
      device.embed({ y, weight, rowCount: rows });
      const values = operations.read(y, rows * cols);
      first ??= values;
      expectSameBits(values, first);
      const variance = values.reduce((sum, value) => sum + value * value, 0) / values.length;
      expect(Math.sqrt(variance)).toBeCloseTo(0.02, 3);
      expect(Math.max(...values)).toBeLessThanOrEqual(0.02 * Math.sqrt(3) * 1.01);
    }
  });
});
