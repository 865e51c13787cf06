// The best that any policy could have done with the same blocks at the same times: on overflow, drop the
// block whose next use is furthest away (Belady, 1966). A block is stored from the end of one turn to the
// start of the next, or it is not: an interval, and among intervals of equal blocks this choice keeps the
// largest number possible.

import { IndexedHeap } from "../kvcache/indexed-heap.ts";
import type { SimulatedBlock } from "./conversation.ts";

/** What the optimum keeps, over the measured turns. */
export interface Optimum {
  readonly hitBlocks: number;
  readonly hitTokens: number;
  /** Turns whose whole history it keeps. */
  readonly hitTurns: number;
}

interface Start {
  readonly kind: "start";
  readonly session: number;
  readonly blocks: readonly SimulatedBlock[];
  readonly tokenCounts: readonly number[];
}

interface Finish {
  readonly kind: "finish";
  readonly session: number;
  readonly blocks: readonly SimulatedBlock[];
}

interface Kept {
  readonly block: SimulatedBlock;
  readonly nextStart: number;
  readonly heapIndexes: number[];
}

export class AccessLog {
  readonly #events: (Start | Finish)[] = [];

  constructor(readonly capacityBlocks: number) {}

  /** A turn starts and wants these blocks. */
  start(session: number, blocks: readonly SimulatedBlock[]): void {
    const tokenCounts = blocks.map((block) => block.tokenCount);
    this.#events.push({ kind: "start", session, blocks: [...blocks], tokenCounts });
  }

  /** A turn is over that others will follow; these blocks could be stored from now on. */
  finish(session: number, blocks: readonly SimulatedBlock[]): void {
    this.#events.push({ kind: "finish", session, blocks: [...blocks] });
  }

  optimum(warmupTurns: number): Optimum {
    const nextStarts = this.#nextStarts();
    const kept = new Map<SimulatedBlock, Kept>();
    const furthest = new IndexedHeap<Kept>(0, (a, b) =>
      a.nextStart === b.nextStart ? a.block.depth > b.block.depth : a.nextStart > b.nextStart,
    );
    const sum = { hitBlocks: 0, hitTokens: 0, hitTurns: 0 };
    let startCount = 0;
    this.#events.forEach((event, i) => {
      if (event.kind === "start") {
        const isMeasured = startCount++ >= warmupTurns;
        takeOut(event, kept, furthest, isMeasured ? sum : null);
        return;
      }
      const wanted = this.#wantedNext(nextStarts[i]!);
      for (const block of event.blocks) {
        if (!wanted.has(block)) continue;
        const entry = { block, nextStart: nextStarts[i]!, heapIndexes: [-1] };
        kept.set(block, entry);
        furthest.add(entry);
      }
      while (furthest.size > this.capacityBlocks) {
        const dropped = furthest.peek()!;
        furthest.remove(dropped);
        kept.delete(dropped.block);
      }
    });
    return sum;
  }

  #wantedNext(start: number): ReadonlySet<SimulatedBlock> {
    const event = this.#events[start];
    return new Set(event?.kind === "start" ? event.blocks : []);
  }

  /** For each finish, the index of the start that follows in its session. */
  #nextStarts(): Float64Array {
    const next = new Float64Array(this.#events.length).fill(Infinity);
    const lastStart = new Map<number, number>();
    for (let i = this.#events.length - 1; i >= 0; i--) {
      const event = this.#events[i]!;
      if (event.kind === "start") lastStart.set(event.session, i);
      else next[i] = lastStart.get(event.session) ?? Infinity;
    }
    return next;
  }
}

function takeOut(
  start: Start,
  kept: Map<SimulatedBlock, Kept>,
  furthest: IndexedHeap<Kept>,
  sum: { hitBlocks: number; hitTokens: number; hitTurns: number } | null,
): void {
  let hitBlocks = 0;
  start.blocks.forEach((block, i) => {
    const entry = kept.get(block);
    if (entry === undefined) return;
    furthest.remove(entry);
    kept.delete(block);
    hitBlocks++;
    if (sum !== null) sum.hitTokens += start.tokenCounts[i]!;
  });
  if (sum === null) return;
  sum.hitBlocks += hitBlocks;
  if (hitBlocks > 0 && hitBlocks === start.blocks.length) sum.hitTurns++;
}
