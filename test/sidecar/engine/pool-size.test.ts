// How many KV blocks a device gets, and what is said about its memory.

import { describe, expect, test } from "bun:test";
import { describeMemory, poolBlocks, PoolSizeError, type PoolSizeInput } from "../../../sidecar/engine/pool-size.ts";

const MIB = 2 ** 20;
const GPU: PoolSizeInput = {
  wantedBlocks: null, wantedBytes: null, utilization: 0.9, isGpu: true, freeBytes: 600 * MIB, totalBytes: 1000 * MIB,
  blockBytes: MIB, blockTokens: 64, maxModelLen: 640,
};

function refusal(changes: Partial<PoolSizeInput>): string {
  try {
    return `${poolBlocks({ ...GPU, ...changes })} blocks`;
  } catch (error) {
    expect(error).toBeInstanceOf(PoolSizeError);
    return (error as Error).message;
  }
}

describe("the number of KV blocks", () => {
  test("on a GPU is what utilization leaves beside weights and workspace", () => {
    expect(poolBlocks(GPU)).toBe(500);
    expect(poolBlocks({ ...GPU, utilization: 0.5 })).toBe(100);
  });

  test("on a CPU is a modest share of what is free", () => {
    expect(poolBlocks({ ...GPU, isGpu: false })).toBe(150);
    expect(poolBlocks({ ...GPU, isGpu: false, freeBytes: 2 ** 40 })).toBe(4096);
  });

  test("is what was asked for, in blocks before bytes", () => {
    expect(poolBlocks({ ...GPU, wantedBytes: 40 * MIB })).toBe(40);
    expect(poolBlocks({ ...GPU, wantedBytes: 40 * MIB, wantedBlocks: 50 })).toBe(50);
  });

  test("holds one sequence of the longest length, or is refused with the numbers", () => {
    expect(poolBlocks({ ...GPU, wantedBlocks: 12 })).toBe(12);
    expect(refusal({ wantedBlocks: 11 })).toStartWith(
      "11 KV blocks of 64 tokens do not hold one sequence of --max-model-len 640 (12 blocks, 12 MiB)",
    );
    expect(refusal({ utilization: 0.3 })).toStartWith("0 KV blocks");
  });

  test("fits the memory that is free, or is refused with the numbers", () => {
    expect(refusal({ wantedBlocks: 601 })).toBe(
      "601 KV blocks need 601 MiB, but only 600 MiB of memory are free: lower --gpu-blocks or --gpu-memory",
    );
  });
});

test("the plan of a GPU's memory adds up", () => {
  const plan = { totalBytes: 1000 * MIB, freeBytes: 600 * MIB, weightBytes: 300 * MIB, kvBytes: 500 * MIB };
  expect(describeMemory(plan)).toBe(
    "GPU memory: weights 300 MiB, workspace, driver and others 100 MiB, KV 500 MiB, free 100 MiB, in all 1000 MiB",
  );
});
