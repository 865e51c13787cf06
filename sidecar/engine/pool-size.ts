// How many KV blocks the compute device gets: what was asked for, or what memory allows, and never fewer than one
// sequence of the longest length needs.

import { readableBytes } from "../kvcache/readable-bytes.ts";

/** The memory does not hold even one sequence; the message has the numbers and the ways out. */
export class PoolSizeError extends Error {
  override name = "PoolSizeError";
}

export interface PoolSizeInput {
  /** --gpu-blocks. */
  readonly wantedBlocks: number | null;
  /** --gpu-memory, in bytes. */
  readonly wantedBytes: number | null;
  /** --gpu-memory-utilization. */
  readonly utilization: number;
  readonly isGpu: boolean;
  /** Once weights and workspace are in place. */
  readonly freeBytes: number;
  readonly totalBytes: number;
  readonly blockBytes: number;
  readonly blockTokens: number;
  readonly maxModelLen: number;
}

/** On a CPU the KV shares the machine with everything else, so the default stays modest. */
const CPU_SHARE = 0.25;
const CPU_BYTES_MAX = 4 * 2 ** 30;

/** Throws PoolSizeError. */
export function poolBlocks(input: PoolSizeInput): number {
  const needed = Math.ceil((input.maxModelLen + 1) / input.blockTokens) + 1;
  const blocks = input.wantedBlocks ?? Math.floor(budgetBytes(input) / input.blockBytes);
  const bytes = Math.max(blocks, needed) * input.blockBytes;
  if (blocks < needed) {
    throw new PoolSizeError(
      `${blocks} KV blocks of ${input.blockTokens} tokens do not hold one sequence of --max-model-len ` +
        `${input.maxModelLen} (${needed} blocks, ${readableBytes(bytes)}): give more --gpu-memory or a smaller ` +
        "--max-model-len",
    );
  }
  if (bytes > input.freeBytes) {
    const free = readableBytes(input.freeBytes);
    throw new PoolSizeError(
      `${blocks} KV blocks need ${readableBytes(bytes)}, but only ${free} of memory are free: ` +
        "lower --gpu-blocks or --gpu-memory",
    );
  }
  return blocks;
}

/** Where the GPU's memory goes, said once at start; free as it is before the KV blocks are made. */
export function describeMemory(plan: {
  readonly totalBytes: number;
  readonly freeBytes: number;
  readonly weightBytes: number;
  readonly kvBytes: number;
}): string {
  const { totalBytes, freeBytes, weightBytes, kvBytes } = plan;
  const parts = [
    `weights ${readableBytes(weightBytes)}`,
    `workspace, driver and others ${readableBytes(totalBytes - freeBytes - weightBytes)}`,
    `KV ${readableBytes(kvBytes)}`,
    `free ${readableBytes(freeBytes - kvBytes)}`,
  ];
  return `GPU memory: ${parts.join(", ")}, in all ${readableBytes(totalBytes)}`;
}

function budgetBytes({ wantedBytes, utilization, isGpu, freeBytes, totalBytes }: PoolSizeInput): number {
  if (wantedBytes !== null) return wantedBytes;
  if (isGpu) return Math.max(0, freeBytes - totalBytes * (1 - utilization));
  return Math.min(freeBytes * CPU_SHARE, CPU_BYTES_MAX);
}
