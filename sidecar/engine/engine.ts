// The loop body: read what the device finished, decide who runs next, enqueue it. One step stays ahead: step n + 1 is
// enqueued before the tokens of step n are read, which works because a sampled token stays on the device and feeds
// the next step there. A stop is therefore seen one step late, and the extra token is dropped.
//
// Nothing here sends or waits: step() returns what happened, so that tests need no sockets and no clocks.

import { assert } from "../assert.ts";
import type { BlockId } from "../kvcache/block-hash.ts";
import type { KvCache } from "../kvcache/kv-cache.ts";
import type { Batch } from "../model/batch.ts";
import type { ForwardHooks } from "../model/decoder.ts";
import type { FinishReason } from "../protocol.ts";
import { type EngineEvent, type EngineRequest, nowMs } from "./request.ts";
import { type ScheduledRows, Scheduler, type SchedulerOptions } from "./scheduler.ts";
import { Sequence } from "./sequence.ts";

/** The device side of a step. */
export interface StepRunner {
  /** Batches in turn; as many steps can be in flight. */
  readonly batches: readonly Batch[];
  /** The tokens of the sequence's view into the device's row `slot`. */
  writeTokens(slot: number, tokens: Int32Array): void;
  /** Enqueues the whole step, sampling and the batch's `finished` event included. */
  run(batch: Batch, hooks: ForwardHooks | null): void;
  /** Throws when the step failed. */
  isFinished(batch: Batch): boolean;
}

export interface EngineOptions extends SchedulerOptions {
  /** Requests that may wait; one more is refused. */
  readonly maxWaiting: number;
  readonly eosTokens: ReadonlySet<number>;
}

/** A step that the device works on. */
interface StepInFlight {
  readonly batch: Batch;
  readonly samples: readonly { sequence: Sequence; logitRow: number }[];
  readonly enqueuedAtMs: number;
  readonly rowCount: number;
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
    this.#scheduler = new Scheduler(cache, options, ({ slot, tokens, table }) => {
      runner.writeTokens(slot, cache.rule.viewTokens(tokens, table!.drops));
    });
  }

  /** The cache moves blocks, or will want to, without any request. */
  get hasBackgroundWork(): boolean {
    return this.cache.isBusy(this.now());
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

  /**
   * Ends all choices of a request, or one (a stop string was found). What was computed stays cached. Unknown ids are
   * ignored: it may just have ended.
   */
  abort(requestId: number, choice: number | null, reason: FinishReason): void {
    for (const sequence of this.#choices.get(requestId) ?? []) {
      const isMeant = choice === null || sequence.choice === choice;
      if (isMeant && sequence.state !== "finished") this.#finish(sequence, reason);
    }
  }

  /** Removes blocks, and what continues them, from all tiers; says how many were in each. */
  forget(blockIds: readonly string[]): Record<string, number> {
    return this.cache.forget(blockIds as readonly BlockId[], this.now());
  }

  /** One turn of the loop. Returns what happened since the last one. */
  step(): EngineEvent[] {
    this.#complete();
    this.#expire();
    this.cache.poll(this.now());
    const batch = this.#freeBatches.pop();
    if (batch !== undefined && !this.#enqueue(batch)) this.#freeBatches.push(batch);
    this.cache.startSaves("now", this.now());
    return this.takeEvents();
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
      const { batch, samples, enqueuedAtMs, rowCount } = this.#inFlight.shift()!;
      this.cache.noteStepCompleted();
      this.cache.stepTimes.note(rowCount, enqueuedAtMs, this.now());
      for (const { sequence, logitRow } of samples) this.#applySample(sequence, batch, logitRow);
      this.#freeBatches.push(batch);
    }
  }

  #applySample(sequence: Sequence, batch: Batch, logitRow: number): void {
    if (sequence.state === "finished") return; // The token after a stop.
    const { token, logprob, top } = batch.result(logitRow);
    const { request, choice } = sequence;
    if (token < 0) {
      const blockIds = this.#failAll(request.id, "the model's logits are not finite");
      // Something in the view's KV may be the reason: nobody shall meet it again, nor what was cached of it before.
      this.cache.forget(blockIds as readonly BlockId[], this.now(), "corrupt");
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
    const nowMs = this.now();
    const scheduled = this.#scheduler.schedule(nowMs);
    if (scheduled.length === 0) return false;
    batch.reset();
    const samples: { sequence: Sequence; logitRow: number }[] = [];
    for (const rows of scheduled) {
      const logitRow = addRows(batch, rows);
      if (logitRow >= 0) samples.push({ sequence: rows.sequence, logitRow });
    }
    this.#steps++;
    this.#rowsComputed += batch.rowCount;
    // Named before they are computed, so that each layer can be saved behind its computation.
    for (const { sequence, count } of scheduled) {
      this.#announce(sequence);
      this.#advance(sequence, count);
    }
    const { rowCount, sequenceCount } = batch;
    this.runner.run(batch, this.#hooks(scheduled, rowCount > sequenceCount));
    this.cache.noteStepEnqueued();
    this.#inFlight.push({ batch, samples, enqueuedAtMs: nowMs, rowCount });
    return true;
  }

  /** How the copy streams take part in a step, layer by layer; null: they have nothing to do with it. */
  #hooks(scheduled: readonly ScheduledRows[], isPrefill: boolean): ForwardHooks | null {
    const loads = new Set(scheduled.flatMap(({ sequence }) => sequence.loads));
    for (const load of loads) if (load.isDone()) loads.delete(load);
    for (const { sequence } of scheduled) if (sequence.loads.length > 0) sequence.loads = [];
    const isSaving = isPrefill && this.cache.startSaves("by-layer", this.now());
    if (loads.size === 0 && !isSaving) return null;
    return {
      beforeAttention: (layer) => {
        for (const load of loads) load.awaitLayer("compute", layer);
      },
      afterLayer: (layer) => this.cache.afterLayer(layer),
    };
  }

  /** Says which blocks of its prompt the cache will have, before it can have them. */
  #announce(sequence: Sequence): void {
    const { request, table, tokens, promptLength, droppedTokens } = sequence;
    if (!request.isHeld || sequence.isAnnounced) return;
    sequence.isAnnounced = true;
    const blockIds = this.cache.blockIds(table!, tokens, promptLength - droppedTokens);
    this.#events.push({ type: "begun", request: request.id, blockIds });
  }

  /** The rows will be computed by the step that is enqueued next: later ones may read their KV. */
  #advance(sequence: Sequence, count: number): void {
    sequence.enqueued += count;
    if (sequence.enqueued === sequence.viewLengthAhead) sequence.pendingTokens++;
    this.#commit(sequence);
    const isPromptDone = sequence.isPrefilled && sequence.completionLength === 0;
    if (isPromptDone && sequence.request.choiceCount > 1 && sequence.choice === 0) {
      const length = sequence.promptLength - sequence.droppedTokens;
      this.cache.commitOpen(sequence.table!, sequence.tokens, length, this.now());
    }
  }

  #commit(sequence: Sequence): void {
    if (sequence.table === null) return; // Preempted meanwhile.
    this.cache.commit(sequence.table, sequence.tokens, sequence.committable, this.now());
  }

  #expire(): void {
    const now = this.now();
    for (const [id, sequences] of this.#choices) {
      if (sequences[0]!.request.deadlineAtMs > now) continue;
      const blockIds = this.#releaseAll(sequences);
      this.#choices.delete(id);
      const message = "the request's time was up before its answer was complete";
      this.#fail(id, "deadline_exceeded", message, null, blockIds);
    }
  }

  #finish(sequence: Sequence, reason: FinishReason): void {
    const { request, choice, droppedTokens } = sequence;
    const blockIds = this.#release(sequence);
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
      cache: sequence.cacheReport(droppedTokens),
      missReasons: sequence.missReasons(),
      tokens: sequence.tokens.slice(),
      blockIds,
    });
    const sequences = this.#choices.get(request.id)!;
    if (sequences.every(({ state }) => state === "finished")) this.#choices.delete(request.id);
  }

  /** Returns the blocks that the request leaves in the cache. */
  #failAll(requestId: number, message: string): readonly string[] {
    const blockIds = this.#releaseAll(this.#choices.get(requestId) ?? []);
    this.#choices.delete(requestId);
    this.#fail(requestId, "internal", message, null, blockIds);
    return blockIds;
  }

  /** Returns the ids of the blocks that it leaves in the cache. */
  #release(sequence: Sequence): readonly string[] {
    const { table, tokens, committable } = sequence;
    const ids = table === null ? sequence.leftBlockIds : this.cache.blockIds(table, tokens, committable);
    this.#scheduler.release(sequence, this.now());
    return ids;
  }

  #releaseAll(sequences: readonly Sequence[]): readonly string[] {
    return sequences
      .filter(({ state }) => state !== "finished")
      .flatMap((sequence) => this.#release(sequence));
  }

  #fail(
    request: number,
    code: "queue_full" | "deadline_exceeded" | "internal",
    message: string,
    retryAfterS: number | null,
    blockIds: readonly string[] = [],
  ): void {
    this.#events.push({ type: "fail", request, code, message, retryAfterS, blockIds });
  }

  /** What has happened since the last step: before a stop, what aborted requests leave behind. */
  takeEvents(): EngineEvent[] {
    const events = this.#events;
    this.#events = [];
    return events;
  }
}

/** Returns the logit row from which the sequence's next token is sampled; -1 while its prompt is not complete. */
function addRows(batch: Batch, { sequence, begin, count }: ScheduledRows): number {
  const isLast = begin + count === sequence.viewLengthAhead;
  const { sampling } = sequence.request;
  return batch.add({
    slot: sequence.slot,
    position: begin,
    rowCount: count,
    blockTable: sequence.table!.blocks,
    logits: isLast ? "last" : "none",
    sampling: { ...sampling, seed: sequence.seed },
    promptLength: Math.max(0, sequence.promptLength - sequence.droppedTokens),
    rngPosition: sequence.lengthAhead,
  });
}
