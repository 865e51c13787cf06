// What it costs to load cached blocks and to compute them anew, from what was measured lately, and the choice between
// the two: a cache must never make a request slower than no cache would.

import type { RateMeter } from "./rate-meter.ts";
import type { StepTimes } from "./step-times.ts";

/** One block of a matched prefix, in order: what must move before it can be used. */
export interface BlockCost {
  readonly hostBytes: number;
  readonly diskBytes: number;
}

export interface Choice {
  /** Leading blocks to take from the cache. */
  readonly blockCount: number;
  /** Expected time of loading everything, and of computing everything that would be loaded; null: not known yet. */
  readonly predictedLoadMs: number | null;
  readonly predictedRecomputeMs: number | null;
}

export interface CostModelOptions {
  /** "never": take whatever is cached, whatever it costs. */
  readonly recompute: "auto" | "never";
  readonly blockTokens: number;
}

/** Estimates err: something cached is computed anew only for a gain of this share and of so many ms. */
const GAIN_SHARE = 0.25;
const GAIN_MS = 2;

export class CostModel {
  constructor(
    readonly options: CostModelOptions,
    /** Bytes from host memory to the gpu. */
    readonly loadRate: RateMeter,
    /** Bytes from disk to host memory. */
    readonly readRate: RateMeter,
    readonly stepTimes: StepTimes,
  ) {}

  /**
   * How many leading blocks to load, so that the time to the first token is least. Loads overlap the computation of
   * what follows, layer by layer (CachedAttention, 3.2), reads from disk come before both. `newTokens` are computed in
   * any case; `isShared`: others want the device too, and wait for what is computed anew.
   */
  choose(blocks: readonly BlockCost[], newTokens: number, isShared: boolean): Choice {
    const all = this.#loadMs(blocks);
    const cachedTokens = blocks.filter(isMoving).length * this.options.blockTokens;
    const recomputeMs = this.#anewMs(cachedTokens);
    const predicted = { predictedLoadMs: all, predictedRecomputeMs: recomputeMs };
    if (all === null || recomputeMs === null || this.options.recompute === "never") {
      return { blockCount: blocks.length, ...predicted };
    }
    return { blockCount: this.#cheapest(blocks, newTokens, isShared), ...predicted };
  }

  /** Rate at which a tier must deliver to beat an idle device, bytes per ms: KV bytes made by prefill. */
  breakEven(bytesPerToken: number): number | null {
    const { msPerRow } = this.stepTimes;
    return msPerRow === null ? null : bytesPerToken / msPerRow;
  }

  #cheapest(blocks: readonly BlockCost[], newTokens: number, isShared: boolean): number {
    const bytes = sumOf(blocks);
    let anewTokens = 0;
    const ttftMs = (): number => {
      const computeMs = this.stepTimes.expectedMs(anewTokens + newTokens)!;
      const delayMs = isShared ? this.#anewMs(anewTokens)! : 0;
      return this.#readMs(bytes) + Math.max(this.#copyMs(bytes), computeMs) + delayMs;
    };
    const fullMs = ttftMs();
    let best = { count: blocks.length, ms: fullMs };
    for (let count = blocks.length - 1; count >= 0; count--) {
      bytes.hostBytes -= blocks[count]!.hostBytes;
      bytes.diskBytes -= blocks[count]!.diskBytes;
      anewTokens += this.options.blockTokens;
      const ms = ttftMs();
      if (ms < best.ms) best = { count, ms };
    }
    const isWorthIt = fullMs - best.ms > Math.max(GAIN_MS, fullMs * GAIN_SHARE);
    return isWorthIt ? best.count : blocks.length;
  }

  /** Null while a rate that it needs was never measured, or when nothing has to move. */
  #loadMs(blocks: readonly BlockCost[]): number | null {
    const bytes = sumOf(blocks);
    if (bytes.hostBytes + bytes.diskBytes === 0 || this.loadRate.perMs === null) return null;
    if (bytes.diskBytes > 0 && this.readRate.perMs === null) return null;
    return this.#readMs(bytes) + this.#copyMs(bytes);
  }

  /** What so many more rows add to steps that run in any case. */
  #anewMs(tokens: number): number | null {
    const { msPerRow } = this.stepTimes;
    return msPerRow === null ? null : msPerRow * tokens;
  }

  #readMs({ diskBytes }: BlockCost): number {
    return diskBytes === 0 ? 0 : (this.readRate.expectedMs(diskBytes) ?? 0);
  }

  #copyMs({ hostBytes, diskBytes }: BlockCost): number {
    return this.loadRate.expectedMs(hostBytes + diskBytes) ?? 0;
  }
}

function isMoving({ hostBytes, diskBytes }: BlockCost): boolean {
  return hostBytes > 0 || diskBytes > 0;
}

function sumOf(blocks: readonly BlockCost[]): { hostBytes: number; diskBytes: number } {
  const sum = { hostBytes: 0, diskBytes: 0 };
  for (const { hostBytes, diskBytes } of blocks) {
    sum.hostBytes += hostBytes;
    sum.diskBytes += diskBytes;
  }
  return sum;
}
