// Who runs in the next step: continuous batching with chunked prefill (Sarathi-Serve, OSDI '24). Decodes go first, one
// row each, then prompts fill what is left of the token budget in order of arrival. When blocks run out the youngest
// sequence gives its blocks back and resumes later with the same tokens.

import { assert } from "../assert.ts";
import type { KvCache } from "../kvcache/kv-cache.ts";
import type { Sequence } from "./sequence.ts";

export interface SchedulerOptions {
  /** Rows of one step. */
  readonly maxBatchTokens: number;
  readonly maxSequences: number;
  /** Logit biases of all running sequences together. */
  readonly maxBiases: number;
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
    /** Called when a sequence enters a slot: its tokens must reach the device. */
    readonly onAdmit: (sequence: Sequence) => void,
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
  }

  /** Picks the rows of the next step; empty when nothing can run now. */
  schedule(nowMs: number): ScheduledRows[] {
    const step = new StepBudget(this.options.maxBatchTokens);
    this.#scheduleDecodes(step);
    this.#schedulePrefills(step);
    this.#admit(step, nowMs);
    return step.rows;
  }

  /** Gives back what a finished sequence holds. Its steps in flight may still write to its blocks: the compute stream orders that before any reuse. */
  release(sequence: Sequence): void {
    if (sequence.state === "running") this.#leaveRunning(sequence);
    else removeFrom(this.#waiting, sequence);
    sequence.state = "finished";
  }

  #scheduleDecodes(step: StepBudget): void {
    for (const sequence of this.#running.slice()) {
      if (!sequence.isSchedulable || sequence.tokensToCompute !== 1) continue;
      if (step.rowsLeft === 0) return;
      if (this.#makeRoom(sequence, sequence.enqueued + 1, step)) step.add(sequence, 1);
    }
  }

  #schedulePrefills(step: StepBudget): void {
    for (const sequence of this.#running.slice()) {
      if (!sequence.isSchedulable || sequence.tokensToCompute <= 1) continue;
      if (step.rowsLeft === 0) return;
      const count = Math.min(step.rowsLeft, sequence.tokensToCompute);
      if (this.#makeRoom(sequence, sequence.enqueued + count, step)) step.add(sequence, count);
    }
  }

  /** New sequences start only when their whole prompt fits beside what runs, so that they do not preempt each other. */
  #admit(step: StepBudget, nowMs: number): void {
    let hasWaitingBias = false;
    for (let i = 0; i < this.#waiting.length; ) {
      const sequence = this.#waiting[i]!;
      // Preempted a moment ago: its tokens arrive soon, and nobody behind it may take the blocks it waits for.
      if (sequence.pendingTokens > 0) return;
      if (this.#freeSlots.length === 0 || step.rowsLeft === 0) return;
      // Who has no biases may overtake; who has some may not, or many small lists would starve a long one.
      const waitsForBiases: boolean =
        sequence.biasCount > 0 && (hasWaitingBias || sequence.biasCount > this.#biasesLeft);
      hasWaitingBias ||= waitsForBiases;
      if (waitsForBiases || this.#waitsForLeader(sequence)) {
        i++;
        continue;
      }
      if (!this.#open(sequence)) return;
      this.#waiting.splice(i, 1);
      this.#enterRunning(sequence, nowMs);
      step.add(sequence, Math.min(step.rowsLeft, sequence.tokensToCompute));
    }
  }

  #waitsForLeader({ leader }: Sequence): boolean {
    return leader !== null && leader.state !== "finished" && !leader.isPrefilled;
  }

  /** Opens the sequence on what is cached and takes blocks for all its tokens, if there are enough. */
  #open(sequence: Sequence): boolean {
    const { tokens, chain } = sequence;
    // The last token is always computed: its logits are what the client waits for.
    const limit = tokens.length - 1;
    if (!this.cache.fits(chain, tokens, limit, tokens.length + 1)) return false;
    const { table, cached } = this.cache.open(chain, tokens, limit);
    const isExtended = this.cache.extend(table, tokens.length + 1);
    assert(isExtended, "the cache said that the sequence fits");
    sequence.table = table;
    sequence.enqueued = cached.gpu + cached.host + cached.disk;
    if (sequence.preemptions === 0) sequence.cached = cached;
    return true;
  }

  #enterRunning(sequence: Sequence, nowMs: number): void {
    sequence.slot = this.#freeSlots.pop()!;
    sequence.state = "running";
    sequence.markStarted(nowMs);
    this.#biasesLeft -= sequence.biasCount;
    this.#running.push(sequence);
    this.onAdmit(sequence);
  }

  #leaveRunning(sequence: Sequence): void {
    removeFrom(this.#running, sequence);
    this.#freeSlots.push(sequence.slot);
    this.#biasesLeft += sequence.biasCount;
    const known = Math.min(sequence.enqueued, sequence.tokens.length);
    this.cache.close(sequence.table!, sequence.tokens, known);
    sequence.table = null;
    sequence.slot = -1;
  }

  /** Blocks for `length` positions, taken from the youngest if need be. False: the sequence itself had to go. */
  #makeRoom(sequence: Sequence, length: number, step: StepBudget): boolean {
    while (!this.cache.extend(sequence.table!, length)) {
      const victim = this.#running.findLast((candidate) => !step.contains(candidate));
      assert(victim !== undefined, "a sequence alone must fit the pool");
      this.#preempt(victim);
      if (victim === sequence) return false;
    }
    return true;
  }

  #preempt(sequence: Sequence): void {
    this.#leaveRunning(sequence);
    sequence.state = "waiting";
    sequence.enqueued = 0;
    sequence.preemptions++;
    this.preemptionCount++;
    this.#waiting.unshift(sequence);
  }
}

/** One step in the making. */
class StepBudget {
  readonly rows: ScheduledRows[] = [];
  readonly #members = new Set<Sequence>();

  constructor(public rowsLeft: number) {}

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
