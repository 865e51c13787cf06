// The loop body: read what the device finished, decide who runs next, enqueue it. One step stays ahead: step n + 1 is
// enqueued before the tokens of step n are read, which works because a sampled token stays on the device and feeds
// the next step there. A stop is therefore seen one step late, and the extra token is dropped.
//
// Nothing here sends or waits: step() returns what happened, so that tests need no sockets and no clocks.

import { assert } from "../assert.ts";
import type { KvCache } from "../kvcache/kv-cache.ts";
import type { Batch } from "../model/batch.ts";
import type { CacheReport, FinishReason } from "../protocol.ts";
import { type EngineEvent, type EngineRequest, nowMs } from "./request.ts";
import { type ScheduledRows, Scheduler, type SchedulerOptions } from "./scheduler.ts";
import { Sequence } from "./sequence.ts";

/** The device side of a step. */
export interface StepRunner {
  /** Batches in turn; as many steps can be in flight. */
  readonly batches: readonly Batch[];
  /** The sequence's tokens into the device's row `slot`. */
  writeTokens(slot: number, tokens: Int32Array): void;
  /** Enqueues the whole step, sampling and the batch's `finished` event included. */
  run(batch: Batch): void;
  /** Throws when the step failed. */
  isFinished(batch: Batch): boolean;
}

export interface EngineOptions extends SchedulerOptions {
  /** Requests that may wait; one more is refused. */
  readonly maxWaiting: number;
  readonly eosTokens: ReadonlySet<number>;
}

const NO_CACHE_REPORT: CacheReport = {
  choice: "none", predictedLoadMs: null, predictedRecomputeMs: null, loadedBytes: 0, droppedTokens: 0,
};

/** A step that the device works on. */
interface StepInFlight {
  readonly batch: Batch;
  readonly samples: readonly { sequence: Sequence; logitRow: number }[];
}

export interface EngineStats {
  runningSequences: number;
  waitingSequences: number;
  preemptions: number;
  steps: number;
  rowsComputed: number;
  tokensGenerated: number;
}

export class Engine {
  readonly #scheduler: Scheduler;
  readonly #inFlight: StepInFlight[] = [];
  readonly #freeBatches: Batch[];
  readonly #choices = new Map<number, Sequence[]>();
  #events: EngineEvent[] = [];
  #steps = 0;
  #rowsComputed = 0;
  #tokensGenerated = 0;

  constructor(
    readonly cache: KvCache,
    readonly runner: StepRunner,
    readonly options: EngineOptions,
    readonly now: () => number = nowMs,
  ) {
    this.#freeBatches = [...runner.batches];
    this.#scheduler = new Scheduler(cache, options, (sequence) => {
      runner.writeTokens(sequence.slot, Int32Array.from(sequence.tokens));
    });
  }

  /** Nothing to do until a request comes. */
  get isIdle(): boolean {
    return this.#choices.size === 0 && this.#inFlight.length === 0;
  }

  /** Work is in flight or can be enqueued; otherwise only an event or a request changes anything. */
  get hasStepInFlight(): boolean {
    return this.#inFlight.length > 0;
  }

  /** Queues the request, or answers at once why not. Tokens must fit the context (main has checked). */
  submit(request: EngineRequest): void {
    assert(request.tokens.length > 0, "a prompt has tokens");
    if (this.#scheduler.waitingCount + request.choiceCount > this.options.maxWaiting) {
      this.#fail(request.id, "queue_full", `${this.#scheduler.waitingCount} sequences are waiting already`, 1);
      return;
    }
    const leader = new Sequence(request, 0, this.cache.chain(request.salt), null);
    const followers = Array.from(
      { length: request.choiceCount - 1 },
      (_, i) => new Sequence(request, i + 1, leader.chain.fork(), leader),
    );
    const sequences = [leader, ...followers];
    this.#choices.set(request.id, sequences);
    for (const sequence of sequences) this.#scheduler.add(sequence);
  }

  /** Ends all choices of a request, or one (a stop string was found). What was computed stays cached. Unknown ids are ignored: it may just have ended. */
  abort(requestId: number, choice: number | null, reason: FinishReason): void {
    for (const sequence of this.#choices.get(requestId) ?? []) {
      const isMeant = choice === null || sequence.choice === choice;
      if (isMeant && sequence.state !== "finished") this.#finish(sequence, reason);
    }
  }

  /** One turn of the loop. Returns what happened since the last one. */
  step(): EngineEvent[] {
    this.#complete();
    this.#expire();
    const batch = this.#freeBatches.pop();
    if (batch !== undefined && !this.#enqueue(batch)) this.#freeBatches.push(batch);
    return this.#takeEvents();
  }

  stats(): EngineStats {
    return {
      runningSequences: this.#scheduler.runningCount,
      waitingSequences: this.#scheduler.waitingCount,
      preemptions: this.#scheduler.preemptionCount,
      steps: this.#steps,
      rowsComputed: this.#rowsComputed,
      tokensGenerated: this.#tokensGenerated,
    };
  }

  /** Reads finished steps, oldest first. */
  #complete(): void {
    while (this.#inFlight.length > 0 && this.runner.isFinished(this.#inFlight[0]!.batch)) {
      const { batch, samples } = this.#inFlight.shift()!;
      for (const { sequence, logitRow } of samples) this.#applySample(sequence, batch, logitRow);
      this.#freeBatches.push(batch);
    }
  }

  #applySample(sequence: Sequence, batch: Batch, logitRow: number): void {
    if (sequence.state === "finished") return; // The token after a stop.
    const { token, logprob, top } = batch.result(logitRow);
    const { request, choice } = sequence;
    if (token < 0) {
      this.#failAll(request.id, "the model's logits are not finite");
      return;
    }
    sequence.append(token, this.now());
    this.#tokensGenerated++;
    const isStop = this.options.eosTokens.has(token) && !request.sampling.ignoreEos;
    // The end token is part of the sequence (and of the cache), but not of the answer.
    if (!isStop) this.#events.push({ type: "token", request: request.id, choice, token, logprob, top });
    if (isStop) this.#finish(sequence, "stop");
    else if (sequence.completionLength >= request.maxTokens) this.#finish(sequence, "length");
    else this.#commit(sequence);
  }

  /** False when there was nothing to run. */
  #enqueue(batch: Batch): boolean {
    const scheduled = this.#scheduler.schedule(this.now());
    if (scheduled.length === 0) return false;
    batch.reset();
    const samples: { sequence: Sequence; logitRow: number }[] = [];
    for (const rows of scheduled) {
      const logitRow = addRows(batch, rows);
      if (logitRow >= 0) samples.push({ sequence: rows.sequence, logitRow });
    }
    this.#steps++;
    this.#rowsComputed += batch.rowCount;
    this.runner.run(batch);
    this.#inFlight.push({ batch, samples });
    for (const { sequence, count } of scheduled) this.#advance(sequence, count);
    return true;
  }

  /** The rows are enqueued: later steps may read their KV. */
  #advance(sequence: Sequence, count: number): void {
    sequence.enqueued += count;
    if (sequence.enqueued === sequence.lengthAhead) sequence.pendingTokens++;
    this.#commit(sequence);
    const isPromptDone = sequence.isPrefilled && sequence.completionLength === 0;
    if (isPromptDone && sequence.request.choiceCount > 1 && sequence.choice === 0) {
      this.cache.commitOpen(sequence.table!, sequence.tokens, sequence.promptLength);
    }
  }

  #commit(sequence: Sequence): void {
    if (sequence.table === null) return; // Preempted meanwhile.
    const known = Math.min(sequence.enqueued, sequence.tokens.length);
    this.cache.commit(sequence.table, sequence.tokens, known);
  }

  #expire(): void {
    const now = this.now();
    for (const [id, sequences] of this.#choices) {
      if (sequences[0]!.request.deadlineAtMs > now) continue;
      for (const sequence of sequences) {
        if (sequence.state !== "finished") this.#scheduler.release(sequence);
      }
      this.#choices.delete(id);
      this.#fail(id, "deadline_exceeded", "the request's time was up before its answer was complete", null);
    }
  }

  #finish(sequence: Sequence, reason: FinishReason): void {
    const { request, choice } = sequence;
    this.#scheduler.release(sequence);
    const cachedCount = sequence.cached.gpu + sequence.cached.host + sequence.cached.disk;
    this.#events.push({
      type: "finish",
      request: request.id,
      choice,
      reason,
      usage: {
        promptTokens: sequence.promptLength,
        completionTokens: sequence.completionLength,
        cachedTokens: sequence.cached,
      },
      timings: sequence.timings(this.now()),
      cache: NO_CACHE_REPORT,
      missReasons: { absent: sequence.promptLength - cachedCount },
      tokens: Int32Array.from(sequence.tokens),
    });
    const sequences = this.#choices.get(request.id)!;
    if (sequences.every(({ state }) => state === "finished")) this.#choices.delete(request.id);
  }

  #failAll(requestId: number, message: string): void {
    for (const sequence of this.#choices.get(requestId) ?? []) {
      if (sequence.state !== "finished") this.#scheduler.release(sequence);
    }
    this.#choices.delete(requestId);
    this.#fail(requestId, "internal", message, null);
  }

  #fail(
    request: number,
    code: "queue_full" | "deadline_exceeded" | "internal",
    message: string,
    retryAfterS: number | null,
  ): void {
    this.#events.push({ type: "fail", request, code, message, retryAfterS });
  }

  #takeEvents(): EngineEvent[] {
    const events = this.#events;
    this.#events = [];
    return events;
  }
}

/** Returns the logit row from which the sequence's next token is sampled; -1 while its prompt is not complete. */
function addRows(batch: Batch, { sequence, begin, count }: ScheduledRows): number {
  const isLast = begin + count === sequence.lengthAhead;
  const { sampling } = sequence.request;
  return batch.add({
    slot: sequence.slot,
    position: begin,
    rowCount: count,
    blockTable: sequence.table!.blocks,
    logits: isLast ? "last" : "none",
    sampling: { ...sampling, seed: sequence.seed },
    promptLength: sequence.promptLength,
    rngPosition: sequence.lengthAhead,
  });
}
