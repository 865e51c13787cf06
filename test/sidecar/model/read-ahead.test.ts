// What is asked for ahead of reading: in order, a window ahead and no further, each byte once.

import { describe, expect, test } from "bun:test";
import { ReadAhead } from "../../../sidecar/model/read-ahead.ts";

const MIB = 2 ** 20;

describe("ReadAhead", () => {
  test("asks for a window, and for as much again as was read", () => {
    const asked: number[][] = [];
    const ranges = [{ descriptor: 3, beginByte: 100, endByte: 100 + 40 * MIB }];
    const ahead = new ReadAhead(ranges, (...range) => asked.push(range), 16 * MIB);
    expect(asked).toEqual([]);
    ahead.advance(0);
    expect(asked).toEqual([[3, 100, 8 * MIB], [3, 100 + 8 * MIB, 8 * MIB]]);
    ahead.advance(1);
    expect(asked.splice(2)).toEqual([[3, 100 + 16 * MIB, 8 * MIB]]);
    ahead.advance(8 * MIB - 1);
    expect(asked.splice(2)).toEqual([]);
    ahead.advance(32 * MIB);
    expect(asked.splice(2)).toEqual([[3, 100 + 24 * MIB, 8 * MIB], [3, 100 + 32 * MIB, 8 * MIB]]);
    ahead.advance(MIB);
    expect(asked).toHaveLength(2);
  });

  test("goes from range to range, over files, and skips empty ones", () => {
    const asked: number[][] = [];
    const ranges = [
      { descriptor: 3, beginByte: 0, endByte: 10 }, { descriptor: 3, beginByte: 10, endByte: 10 },
      { descriptor: 4, beginByte: 5, endByte: 5 + 9 * MIB },
    ];
    new ReadAhead(ranges, (...range) => asked.push(range)).advance(0);
    expect(asked).toEqual([[3, 0, 10], [4, 5, 8 * MIB], [4, 5 + 8 * MIB, MIB]]);
  });

  test("of nothing, asks for nothing", () => {
    const ahead = new ReadAhead([], () => expect.unreachable());
    ahead.advance(5);
  });
});
