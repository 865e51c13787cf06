// What a run is judged by. Hit rates have three names because they answer three questions: over turns that
// have a history (can the paper's figures be compared?), over all turns, and over the tokens of prompts.

import type { SimulatedBlock } from "./conversation.ts";
import type { Optimum } from "./optimum.ts";
import type { Tier } from "./tiered-store.ts";

export interface Percentiles {
  readonly mean: number;
  readonly p50: number;
  readonly p95: number;
}

export interface Measured extends RunTotals {
  readonly turns: number;
  readonly turnsWithHistory: number;
  readonly promptTokens: number;
  readonly historyTokens: number;
  /** Turns whose whole history was cached. */
  readonly hitTurns: number;
  readonly hitBlocks: number;
  readonly hitTokens: Readonly<Record<Tier, number>>;
  /** Hit turns whose whole history was in gpu or host memory when they started. */
  readonly memoryHitTurns: number;
  readonly ttftMs: Percentiles;
  /** Without the time in the queue: from the slot to the first token. */
  readonly serviceTtftMs: Percentiles;
  readonly queue: {
    readonly meanTurns: number;
    readonly maxTurns: number;
    /** KV of the waiting turns' histories. */
    readonly meanBytes: number;
    readonly maxBytes: number;
  };
  readonly hitRate: {
    readonly turnsWithHistory: number;
    readonly allTurns: number;
    readonly tokens: number;
    /** Of the hit turns: those served from memory. */
    readonly inMemory: number;
  };
  readonly optimumHitRate: {
    readonly turnsWithHistory: number;
    readonly allTurns: number;
    readonly tokens: number;
  };
  readonly hostToGpuBytes: number;
  readonly gpuToHostBytes: number;
}

export interface RunTotals {
  readonly makespanMs: number;
  readonly prefillMs: number;
  readonly decodeMs: number;
  /** Prompt tokens that were not cached. */
  readonly computedTokens: number;
  readonly bytes: {
    readonly diskRead: number;
    readonly diskReadOnDemand: number;
    readonly diskWritten: number;
  };
  readonly blockBytes: number;
  readonly skippedSaveBlocks: number;
  readonly lostBlocks: number;
  readonly expiredBlocks: number;
  /** The paper's L_pw and L_ev, in sequences. */
  readonly prefetchWindowSequences: number;
  readonly evictionWindowSequences: number;
  readonly optimum: Optimum;
}

export interface Reuse {
  readonly cachedTokens: number;
  readonly gpuBlocks: number;
  readonly firstToken: (nowMs: number) => void;
}

interface StartedTurn {
  readonly arrivedMs: number;
  readonly newTokens: number;
  readonly historyTokens: number;
}

export class Measurements {
  #startedCount = 0;
  #nowMs = 0;
  #queueTurns = 0;
  #queueBlocks = 0;
  #queueTurnsMs = 0;
  #queueBlocksMs = 0;
  #maxQueueTurns = 0;
  #maxQueueBlocks = 0;
  #loadedBlocks = 0;
  #savedBlocks = 0;
  #turns = 0;
  #turnsWithHistory = 0;
  #historyBlocks = 0;
  #promptTokens = 0;
  #historyTokens = 0;
  #hitTurns = 0;
  #memoryHitTurns = 0;
  #hitBlocks = 0;
  readonly #hitTokens = { gpu: 0, host: 0, disk: 0 };
  readonly #ttftMs: number[] = [];
  readonly #serviceTtftMs: number[] = [];

  constructor(readonly warmupTurns: number) {}

  get meanHistoryBlocks(): number {
    return this.#turnsWithHistory === 0 ? 0 : this.#historyBlocks / this.#turnsWithHistory;
  }

  queueChanged(nowMs: number, turns: number, blocks: number): void {
    this.#queueTurnsMs += this.#queueTurns * (nowMs - this.#nowMs);
    this.#queueBlocksMs += this.#queueBlocks * (nowMs - this.#nowMs);
    this.#nowMs = nowMs;
    this.#queueTurns += turns;
    this.#queueBlocks += blocks;
    this.#maxQueueTurns = Math.max(this.#maxQueueTurns, this.#queueTurns);
    this.#maxQueueBlocks = Math.max(this.#maxQueueBlocks, this.#queueBlocks);
  }

  loaded(blocks: number): void {
    this.#loadedBlocks += blocks;
  }

  saved(blocks: number): void {
    this.#savedBlocks += blocks;
  }

  /** A turn got its slot now; `cached` are the leading blocks of its `history` that can be used. */
  started(
    turn: StartedTurn,
    history: readonly SimulatedBlock[],
    cached: readonly SimulatedBlock[],
    tierOf: (block: SimulatedBlock) => Tier,
  ): Reuse {
    const tokens = { gpu: 0, host: 0, disk: 0 };
    const blocks = { gpu: 0, host: 0, disk: 0 };
    for (const block of cached) {
      const tier = tierOf(block);
      tokens[tier] += block.tokenCount;
      blocks[tier]++;
    }
    const startedMs = this.#nowMs;
    const isMeasured = this.#startedCount++ >= this.warmupTurns;
    if (isMeasured) this.#count(turn, history, cached, tokens);
    return {
      cachedTokens: tokens.gpu + tokens.host + tokens.disk,
      gpuBlocks: blocks.gpu,
      firstToken: (nowMs) => {
        if (!isMeasured) return;
        this.#ttftMs.push(nowMs - turn.arrivedMs);
        this.#serviceTtftMs.push(nowMs - startedMs);
      },
    };
  }

  result(totals: RunTotals): Measured {
    const turns = { withHistory: this.#turnsWithHistory, all: this.#turns };
    const hitTokens = this.#hitTokens.gpu + this.#hitTokens.host + this.#hitTokens.disk;
    const { blockBytes, optimum, makespanMs } = totals;
    return {
      ...totals,
      turns: turns.all,
      turnsWithHistory: turns.withHistory,
      promptTokens: this.#promptTokens,
      historyTokens: this.#historyTokens,
      hitTurns: this.#hitTurns,
      hitBlocks: this.#hitBlocks,
      hitTokens: this.#hitTokens,
      memoryHitTurns: this.#memoryHitTurns,
      ttftMs: percentiles(this.#ttftMs),
      serviceTtftMs: percentiles(this.#serviceTtftMs),
      queue: {
        meanTurns: share(this.#queueTurnsMs, makespanMs),
        maxTurns: this.#maxQueueTurns,
        meanBytes: share(this.#queueBlocksMs, makespanMs) * blockBytes,
        maxBytes: this.#maxQueueBlocks * blockBytes,
      },
      hitRate: {
        turnsWithHistory: share(this.#hitTurns, turns.withHistory),
        allTurns: share(this.#hitTurns, turns.all),
        tokens: share(hitTokens, this.#promptTokens),
        inMemory: share(this.#memoryHitTurns, this.#hitTurns),
      },
      optimumHitRate: {
        turnsWithHistory: share(optimum.hitTurns, turns.withHistory),
        allTurns: share(optimum.hitTurns, turns.all),
        tokens: share(optimum.hitTokens, this.#promptTokens),
      },
      hostToGpuBytes: this.#loadedBlocks * blockBytes,
      gpuToHostBytes: this.#savedBlocks * blockBytes,
    };
  }

  #count(
    turn: StartedTurn,
    history: readonly SimulatedBlock[],
    cached: readonly SimulatedBlock[],
    tokens: Readonly<Record<Tier, number>>,
  ): void {
    this.#turns++;
    this.#promptTokens += turn.historyTokens + turn.newTokens;
    this.#historyTokens += turn.historyTokens;
    this.#hitBlocks += cached.length;
    for (const tier of ["gpu", "host", "disk"] as const) this.#hitTokens[tier] += tokens[tier];
    if (history.length === 0) return;
    this.#turnsWithHistory++;
    this.#historyBlocks += history.length;
    if (cached.length < history.length) return;
    this.#hitTurns++;
    if (tokens.disk === 0) this.#memoryHitTurns++;
  }
}

function share(part: number, whole: number): number {
  return whole === 0 ? 0 : part / whole;
}

function percentiles(values: readonly number[]): Percentiles {
  const sorted = Float64Array.from(values).sort();
  const at = (quantile: number) => sorted[Math.floor(quantile * sorted.length)] ?? 0;
  const sum = sorted.reduce((total, value) => total + value, 0);
  return { mean: share(sum, sorted.length), p50: at(0.5), p95: at(0.95) };
}
