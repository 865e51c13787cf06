// Who runs in the next step: continuous batching with chunked prefill (Sarathi-Serve, OSDI '24). Decodes go first, one
// row each, then prompts fill what is left of the token budget in order of arrival. A waiting sequence whose prefix is
// cached below the gpu takes its blocks early and loads while it waits. When blocks run out the youngest sequence gives
// its blocks back and resumes later with the same tokens.

import { assert } from "../assert.ts";
import type { KvCache } from "../kvcache/kv-cache.ts";
import type { Sequence } from "./sequence.ts";

export interface SchedulerOptions {
  /** Rows of one step. */
  readonly maxBatchTokens: number;
  readonly maxSequences: number;
  /** Logit biases of all running sequences together. */
  readonly maxBiases: number;
  /** Gpu blocks that waiting sequences may hold to load into, while no place is free for them to run. */
  readonly loadAheadBlocks: number;
}

/** Rows [begin, begin + count) of a sequence's tokens, to be computed in the next step. */
export interface ScheduledRows {
  readonly sequence: Sequence;
  readonly begin: number;
  readonly count: number;
}

export class Scheduler {
  /** In order of arrival, preempted ones in front. */
  readonly #waiting: Sequence[] = [];
  /** In order of admission: the last is the youngest. */
  readonly #running: Sequence[] = [];
  readonly #freeSlots: number[];
  /** Logit biases that the running sequences have not taken; so a step always holds all of theirs. */
  #biasesLeft: number;
  preemptionCount = 0;

  constructor(
    readonly cache: KvCache,
    readonly options: SchedulerOptions,
    /** Called when a sequence enters a slot, or its view has moved: its tokens must reach the device. */
    readonly onTokensMoved: (sequence: Sequence) => void,
  ) {
    this.#freeSlots = Array.from({ length: options.maxSequences }, (_, i) => options.maxSequences - 1 - i);
    this.#biasesLeft = options.maxBiases;
  }

  get waitingCount(): number {
    return this.#waiting.length;
  }

  get runningCount(): number {
    return this.#running.length;
  }

  sequences(): Sequence[] {
    return [...this.#running, ...this.#waiting];
  }

  add(sequence: Sequence): void {
    this.#waiting.push(sequence);
    sequence.queued = this.cache.enqueue(promptOf(sequence));
  }

  /** Picks the rows of the next step; empty when nothing can run now. */
  schedule(nowMs: number): ScheduledRows[] {
    const step = new StepBudget(this.options.maxBatchTokens, nowMs);
    for (const sequence of this.#running) this.#dropIfFull(sequence, nowMs);
    this.#scheduleDecodes(step);
    this.#schedulePrefills(step);
    this.#admit(step);
    return step.rows;
  }

  /**
   * Gives back what a finished sequence holds. Its steps in flight may still write to its blocks: the compute stream
   * orders that before any reuse.
   */
  release(sequence: Sequence, nowMs: number): void {
    if (sequence.state === "running") this.#leaveRunning(sequence, nowMs);
    else {
      removeFrom(this.#waiting, sequence);
      if (sequence.table !== null) this.#closeTable(sequence, nowMs);
      if (sequence.queued !== null) this.cache.dequeue(sequence.queued);
    }
    sequence.state = "finished";
  }

  /** The view is full and more is to come: its oldest blocks leave it, the rest moves down. */
  #dropIfFull(sequence: Sequence, nowMs: number): void {
    const { windowTokens, dropTokens } = this.cache.rule;
    if (sequence.enqueued < windowTokens || !sequence.isSchedulable) return;
    if (sequence.pendingTokens > 0) return; // the device still knows the next token by its old position
    this.cache.commit(sequence.table!, sequence.tokens, sequence.committable, nowMs);
    this.cache.drop(sequence.table!);
    sequence.enqueued -= dropTokens;
    sequence.droppedTokens += dropTokens;
    this.onTokensMoved(sequence);
  }

  /** Rows that the sequence can give to a step: not past the end of its view. */
  #rowsOf(sequence: Sequence): number {
    if (!sequence.isSchedulable) return 0;
    return Math.min(sequence.tokensToCompute, this.cache.rule.windowTokens - sequence.enqueued);
  }

  #scheduleDecodes(step: StepBudget): void {
    for (const sequence of this.#running.slice()) {
      if (sequence.tokensToCompute !== 1 || this.#rowsOf(sequence) !== 1) continue;
      if (step.rowsLeft === 0) return;
      if (this.#makeRoom(sequence, sequence.enqueued + 1, step)) step.add(sequence, 1);
    }
  }

  #schedulePrefills(step: StepBudget): void {
    for (const sequence of this.#running.slice()) {
      if (sequence.tokensToCompute <= 1) continue;
      if (step.rowsLeft === 0) return;
      const count = Math.min(step.rowsLeft, this.#rowsOf(sequence));
      if (count === 0) continue;
      if (this.#makeRoom(sequence, sequence.enqueued + count, step)) step.add(sequence, count);
    }
  }

  /** New sequences start only when their whole prompt fits beside what runs, so that they do not preempt each other. */
  #admit(step: StepBudget): void {
    let hasWaitingBias = false;
    let isFull = false;
    let heldAhead = this.#heldAhead();
    for (let i = 0; i < this.#waiting.length; ) {
      const sequence = this.#waiting[i]!;
      // Preempted a moment ago: its tokens arrive soon, and nobody behind it may take the blocks it waits for.
      if (sequence.pendingTokens > 0) return;
      const hasPlace = this.#freeSlots.length > 0 && step.rowsLeft > 0;
      if (!hasPlace && heldAhead >= this.options.loadAheadBlocks) return;
      // Who has no biases may overtake; who has some may not, or many small lists would starve a long one.
      const waitsForBiases: boolean =
        sequence.biasCount > 0 && (hasWaitingBias || sequence.biasCount > this.#biasesLeft);
      hasWaitingBias ||= waitsForBiases;
      if (waitsForBiases || this.#waitsForLeader(sequence)) {
        i++;
        continue;
      }
      if (sequence.table === null && !isFull) {
        isFull = this.#open(sequence, step.nowMs) === "no-room";
        heldAhead += heldBlocks(sequence);
      }
      if (!hasPlace || !this.#mayJoin(sequence, step)) {
        // Its blocks are on their way, and others need not wait for them; or there is no room for any, but who holds
        // some already may go on.
        i++;
        continue;
      }
      heldAhead -= heldBlocks(sequence);
      this.#waiting.splice(i, 1);
      this.#enterRunning(sequence, step.nowMs);
      this.#dropIfFull(sequence, step.nowMs);
      // After a drop its blocks may end early: then it gets its rows with the next step.
      const covered = sequence.table!.blocks.length * this.cache.blockTokens - sequence.enqueued;
      const count = Math.min(step.rowsLeft, this.#rowsOf(sequence), covered);
      if (count > 0) step.add(sequence, count);
    }
  }

  #waitsForLeader({ leader }: Sequence): boolean {
    return leader !== null && leader.state !== "finished" && !leader.isPrefilled;
  }

  /** Gpu blocks of sequences that do not run yet. */
  #heldAhead(): number {
    return this.#waiting.reduce((sum, sequence) => sum + heldBlocks(sequence), 0);
  }

  #mayJoin(sequence: Sequence, step: StepBudget): boolean {
    if (sequence.table === null) return false;
    return this.cache.mayJoin(sequence.loads, Math.min(step.rowsLeft, sequence.tokensToCompute));
  }

  /** Opens the sequence on what is cached and takes blocks for all its tokens, if there are enough. */
  #open(sequence: Sequence, nowMs: number): "opened" | "no-room" | "reading" {
    const { tokens } = sequence;
    const prompt = sequence.queued!;
    prompt.tokens = tokens;
    // The last token is always computed: its logits are what the client waits for.
    prompt.limit = tokens.length - 1;
    const isShared = this.#running.length > 0 || this.#waiting.length > 1;
    const opened = this.cache.open(prompt, tokens.length + 1, { nowMs, isShared });
    if (opened === "reading") sequence.markFetching(nowMs);
    if (typeof opened === "string") return opened;
    sequence.queued = null;
    sequence.open(opened, opened.table.drops * this.cache.rule.dropTokens, nowMs);
    return "opened";
  }

  #enterRunning(sequence: Sequence, nowMs: number): void {
    sequence.slot = this.#freeSlots.pop()!;
    sequence.state = "running";
    sequence.markStarted(nowMs);
    this.#biasesLeft -= sequence.biasCount;
    this.#running.push(sequence);
    this.onTokensMoved(sequence);
  }

  #leaveRunning(sequence: Sequence, nowMs: number): void {
    removeFrom(this.#running, sequence);
    this.#freeSlots.push(sequence.slot);
    this.#biasesLeft += sequence.biasCount;
    sequence.slot = -1;
    this.#giveTableBack(sequence, nowMs);
  }

  /** The sequence may end without another one, and still has to say what it leaves in the cache. */
  #giveTableBack(sequence: Sequence, nowMs: number): void {
    sequence.leftBlockIds = this.cache.blockIds(sequence.table!, sequence.tokens, sequence.committable);
    this.#closeTable(sequence, nowMs);
  }

  #closeTable(sequence: Sequence, nowMs: number): void {
    this.cache.close(sequence.table!, sequence.tokens, sequence.committable, nowMs);
    sequence.forgetTable();
  }

  /**
   * Blocks for `length` positions, taken from the youngest if need be. False: the sequence itself had to go, or skips
   * this step until what is in its way has moved down.
   */
  #makeRoom(sequence: Sequence, length: number, step: StepBudget): boolean {
    for (;;) {
      const outcome = this.cache.extend(sequence.table!, length, step.nowMs);
      if (outcome !== "no-room") return outcome === "extended";
      if (this.#giveUpLoad(step.nowMs)) continue;
      const victim = this.#running.findLast((candidate) => !step.contains(candidate));
      assert(victim !== undefined, "a sequence alone must fit the pool");
      this.#preempt(victim, step.nowMs);
      if (victim === sequence) return false;
    }
  }

  /** The last of the waiting sequences that hold blocks already gives them back; false: there is none. */
  #giveUpLoad(nowMs: number): boolean {
    const waiting = this.#waiting.findLast(({ table }) => table !== null);
    if (waiting === undefined) return false;
    this.#giveTableBack(waiting, nowMs);
    waiting.queued = this.cache.enqueue(promptOf(waiting));
    return true;
  }

  #preempt(sequence: Sequence, nowMs: number): void {
    this.#leaveRunning(sequence, nowMs);
    sequence.state = "waiting";
    sequence.preemptions++;
    this.preemptionCount++;
    this.#waiting.unshift(sequence);
    sequence.queued = this.cache.enqueue(promptOf(sequence), true);
  }
}

function heldBlocks({ table }: Sequence): number {
  return table?.blocks.length ?? 0;
}

function promptOf({ chain, tokens, request }: Sequence) {
  return { chain, tokens, limit: tokens.length - 1, keep: request.keep };
}

/** One step in the making. */
class StepBudget {
  readonly rows: ScheduledRows[] = [];
  readonly #members = new Set<Sequence>();

  constructor(
    public rowsLeft: number,
    readonly nowMs: number,
  ) {}

  contains(sequence: Sequence): boolean {
    return this.#members.has(sequence);
  }

  add(sequence: Sequence, count: number): void {
    this.rows.push({ sequence, begin: sequence.enqueued, count });
    this.#members.add(sequence);
    this.rowsLeft -= count;
  }
}

function removeFrom(list: Sequence[], sequence: Sequence): void {
  const index = list.indexOf(sequence);
  assert(index >= 0, "the sequence is not in the list");
  list.splice(index, 1);
}
