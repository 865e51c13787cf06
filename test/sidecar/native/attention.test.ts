// Attention and the storing of keys and values against doubles: head sizes odd and even, grouped heads, windows,
// ALiBi, every KV dtype and instruction set; memory that must not be read holds NaN.

import { describe, expect, test } from "bun:test";
import type { Isa } from "../../../sidecar/native.ts";
import { attended, type AttentionShape, rotated } from "../../support/attention-reference.ts";
import { expectSameBits, joined } from "../../support/logits.ts";
import {
  type FloatDtype,
  ISAS,
  KvAccess,
  NO_ADDRESS,
  normals,
  OperationDevice,
  rounded,
  rowsOf,
} from "../../support/operation-device.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

interface Case {
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly rotaryDim: number;
  readonly blockTokens: number;
  readonly kvDtype: FloatDtype;
  readonly window?: number;
  readonly hasAlibi?: boolean;
}

const CASES: readonly Case[] = [
  { heads: 1, kvHeads: 1, headDim: 5, rotaryDim: 2, blockTokens: 8, kvDtype: "f32" },
  { heads: 4, kvHeads: 4, headDim: 32, rotaryDim: 32, blockTokens: 8, kvDtype: "bf16" },
  { heads: 6, kvHeads: 2, headDim: 64, rotaryDim: 64, blockTokens: 16, kvDtype: "bf16" },
  { heads: 6, kvHeads: 2, headDim: 64, rotaryDim: 64, blockTokens: 64, kvDtype: "f16" },
  { heads: 8, kvHeads: 1, headDim: 80, rotaryDim: 40, blockTokens: 32, kvDtype: "bf16", window: 20 },
  { heads: 7, kvHeads: 1, headDim: 24, rotaryDim: 0, blockTokens: 8, kvDtype: "f32", hasAlibi: true },
  { heads: 2, kvHeads: 2, headDim: 128, rotaryDim: 128, blockTokens: 16, kvDtype: "f16", window: 9 },
  { heads: 15, kvHeads: 3, headDim: 17, rotaryDim: 16, blockTokens: 8, kvDtype: "bf16", window: 1 },
  { heads: 2, kvHeads: 1, headDim: 256, rotaryDim: 64, blockTokens: 256, kvDtype: "bf16" },
  { heads: 1, kvHeads: 1, headDim: 512, rotaryDim: 512, blockTokens: 8, kvDtype: "f32" },
];
const POSITIONS = 90;

/** A device with a sequence of POSITIONS tokens, whose blocks lie in shuffled order among others full of NaN. */
class View {
  readonly operations: OperationDevice;
  readonly shape: AttentionShape;
  readonly kv: KvAccess;
  readonly table: readonly number[];
  readonly blocks: readonly Float32Array[];
  readonly queries: Float32Array;

  constructor(
    readonly options: Case,
    isa: Isa,
    threadCount: number,
    random: SeededRandom,
  ) {
    const { heads, kvHeads, headDim, rotaryDim, blockTokens, kvDtype, hasAlibi } = options;
    const scale = 1 / Math.sqrt(headDim);
    this.operations = new OperationDevice({
      heads, kvHeads, headDim, rotaryDim, blockTokens, kvDtype, isa, threadCount, attentionScale: Math.fround(scale),
      maxRows: 256, maxPositions: 256,
    });
    const frequencies = Float64Array.from({ length: rotaryDim / 2 }, (_, i) => 10000 ** ((-2 * i) / rotaryDim));
    if (rotaryDim > 0) this.operations.device.setRope(frequencies);
    const alibi = hasAlibi === true ? Float32Array.from({ length: heads }, (_, i) => 2 ** -(i + 1)) : null;
    if (alibi !== null) this.operations.device.setAlibi(alibi);
    this.shape = { heads, kvHeads, headDim, rotaryDim, blockTokens, scale: Math.fround(scale), frequencies, alibi };
    const count = Math.ceil(POSITIONS / blockTokens);
    this.kv = new KvAccess(this.operations.device, 2 * count + 1);
    this.table = random.shuffled(Array.from({ length: 2 * count + 1 }, (_, i) => i)).slice(0, count);
    const floats = 2 * kvHeads * blockTokens * headDim;
    for (let block = 0; block <= 2 * count; block++) this.kv.write(0, block, new Float32Array(floats).fill(NaN));
    this.blocks = this.table.map((block, j) => {
      const values = rounded(normals(random, floats), kvDtype);
      // Positions that do not exist yet.
      for (let offset = Math.max(0, POSITIONS - j * blockTokens); offset < blockTokens; offset++) {
        for (let head = 0; head < 2 * kvHeads; head++) {
          const at = (head * blockTokens + offset) * headDim;
          values.fill(NaN, at, at + headDim);
        }
      }
      this.kv.write(0, block, values);
      return values;
    });
    this.queries = normals(random, POSITIONS * heads * headDim);
  }

  /** Outputs of rows [position, position + count); entries outside their window are -1 in the table. */
  attend(position: number, count: number): Float32Array {
    const { operations, shape, queries, options } = this;
    const size = shape.heads * shape.headDim;
    const window = options.window ?? 0;
    const firstKey = window === 0 ? 0 : Math.max(0, position - window + 1);
    const table = this.table.map((block, j) => ((j + 1) * shape.blockTokens <= firstKey ? -1 : block));
    operations.begin([rowsOf(3, position, count, table)]);
    const q = operations.place(queries.slice(position * size, (position + count) * size));
    const y = operations.poisoned(count * size);
    operations.device.attention({ y, q, layer: 0, window, rowCount: count });
    return operations.read(y, count * size);
  }

  expected(position: number): number[] {
    const { heads, headDim } = this.shape;
    return Array.from({ length: heads }, (_, head) => {
      const at = (position * heads + head) * headDim;
      const q = this.queries.subarray(at, at + headDim);
      return attended(this.shape, q, head, position, this.options.window ?? 0, this.blocks);
    }).flat();
  }

  [Symbol.dispose](): void {
    this.operations[Symbol.dispose]();
  }
}

function worstDifference(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  expect(actual.length).toBe(expected.length);
  let worst = 0;
  for (let i = 0; i < actual.length; i++) worst = Math.max(worst, Math.abs(actual[i]! - expected[i]!));
  return worst;
}

const seed = testSeed();
describe.each(ISAS)("attention on %s", (isa: Isa) => {
  for (const options of CASES) {
    const name = JSON.stringify(options);

    test(`is that of doubles: ${name} (SEED=${seed})`, () => {
      using view = new View(options, isa, 2, new SeededRandom(seed));
      const actual = view.attend(0, POSITIONS);
      const expected = Array.from({ length: POSITIONS }, (_, position) => view.expected(position)).flat();
      expect(worstDifference(actual, expected)).toBeLessThan(2e-5);
    });

    test(`gives a row the same bits in any chunk, on any threads: ${name} (SEED=${seed})`, () => {
      using one = new View(options, isa, 1, new SeededRandom(seed));
      const whole = one.attend(0, POSITIONS);
      using view = new View(options, isa, 5, new SeededRandom(seed));
      const random = new SeededRandom(seed + 1);
      const parts: Float32Array[] = [];
      for (let position = 0; position < POSITIONS; ) {
        const count = Math.min(POSITIONS - position, random.next() < 0.3 ? 1 : random.integer(1, 40));
        parts.push(view.attend(position, count));
        position += count;
      }
      expectSameBits(joined(parts), whole);
    });

    test(`finds keys and values where they were stored: ${name} (SEED=${seed})`, () => {
      const random = new SeededRandom(seed);
      using view = new View(options, isa, 2, random);
      checkAppend(view, random);
    });
  }

  test("gives rows of many sequences and padding in one step the bits they have alone", () => {
    const options: Case = { heads: 6, kvHeads: 2, headDim: 32, rotaryDim: 32, blockTokens: 8, kvDtype: "bf16" };
    using view = new View(options, isa, 3, new SeededRandom(seed));
    const { operations, shape } = view;
    const size = shape.heads * shape.headDim;
    const runs = [[0, 5], [60, 1], [33, 20], [89, 1], [7, 2]] as const;
    const alone = runs.map(([position, count]) => view.attend(position, count));
    const batch = operations.begin(runs.map(([position, count], slot) => rowsOf(slot, position, count, view.table)));
    batch.padTo(40, 0);
    batch.seal();
    operations.device.beginStep(batch.stepAddress, batch.stepBytes);
    const q = new Float32Array(40 * size);
    let row = 0;
    for (const [position, count] of runs) {
      q.set(view.queries.subarray(position * size, (position + count) * size), row * size);
      row += count;
    }
    const y = operations.poisoned(40 * size);
    operations.device.attention({ y, q: operations.place(q), layer: 0, window: 0, rowCount: 40 });
    expectSameBits(operations.read(y, row * size), joined(alone));
  });
});

/** Appends rows over block borders and compares what lies in the blocks, and what went to q, with doubles. */
function checkAppend(view: View, random: SeededRandom): void {
  const { operations, shape, kv, options } = view;
  const { heads, kvHeads, headDim, blockTokens } = shape;
  const hasNorms = random.next() < 0.5;
  const [position, count] = [Math.min(blockTokens, POSITIONS / 2) - 3, 12];
  const qkvSize = (heads + 2 * kvHeads) * headDim;
  const qkv = normals(random, count * qkvSize);
  const [qNorm, kNorm] = [normals(random, headDim), normals(random, headDim)];
  operations.begin([rowsOf(0, position, count, view.table)]);
  const q = operations.poisoned(count * heads * headDim);
  operations.device.appendKv({
    q,
    qkv: operations.place(qkv),
    layer: 0,
    qNorm: hasNorms ? operations.place(qNorm) : NO_ADDRESS,
    kNorm: hasNorms ? operations.place(kNorm) : NO_ADDRESS,
    rowCount: count,
    epsilon: 1e-6,
  });
  const normed = (x: Float32Array, weight: Float32Array): number[] => {
    if (!hasNorms) return [...x];
    const mean = x.reduce((sum, value) => sum + value * value, 0) / headDim;
    return Array.from(x, (value, i) => (value / Math.sqrt(mean + 1e-6)) * weight[i]!);
  };
  const head = (row: number, index: number): Float32Array =>
    qkv.subarray(row * qkvSize + index * headDim, row * qkvSize + (index + 1) * headDim);
  const step = { f32: 2 ** -22, f16: 2 ** -10, bf16: 2 ** -7 }[options.kvDtype];
  const qs = operations.read(q, count * heads * headDim);
  for (let row = 0; row < count; row++) {
    const expected = Array.from({ length: heads }, (_, index) => normed(head(row, index), qNorm)).flat();
    const actual = qs.subarray(row * heads * headDim, (row + 1) * heads * headDim);
    expect(worstDifference(actual, expected)).toBeLessThan(1e-5);
    const offset = (position + row) % blockTokens;
    const stored = kv.read(0, view.table[Math.floor((position + row) / blockTokens)]!);
    for (let index = 0; index < kvHeads; index++) {
      const key = rotated(shape, normed(head(row, heads + index), kNorm), offset);
      const at = (index * blockTokens + offset) * headDim;
      const value = rounded(head(row, heads + kvHeads + index).slice(), options.kvDtype);
      const valueAt = at + kvHeads * blockTokens * headDim;
      expect([...stored.subarray(valueAt, valueAt + headDim)]).toEqual([...value]);
      key.forEach((expectedValue, d) => {
        const difference = Math.abs(stored[at + d]! - expectedValue);
        expect(difference).toBeLessThanOrEqual(step * Math.abs(expectedValue) + 2e-6);
      });
    }
  }
}
