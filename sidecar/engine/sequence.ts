// One choice of one request, from the queue to its last token. Its tokens are prompt + completion; of the view that the
// model has of them, the first `enqueued` positions have their KV computed by steps already given to the device.

import { assert } from "../assert.ts";
import type { BlockChain } from "../kvcache/block-chain.ts";
import type { BlockTable, CachedTokens, OpenedSequence, QueuedPrompt } from "../kvcache/opened-sequence.ts";
import type { LayerTransfer } from "../kvcache/layer-transfer.ts";
import type { CacheReport, FinishReason, Timings } from "../protocol.ts";
import type { EngineRequest } from "./request.ts";

export type SequenceState = "waiting" | "running" | "finished";

const NO_CACHED_TOKENS: CachedTokens = { gpu: 0, host: 0, disk: 0 };

export class Sequence {
  state: SequenceState = "waiting";
  #tokens: Int32Array;
  /** Begins with the tokens, and has room for more. */
  #memory: Int32Array;
  readonly promptLength: number;
  readonly seed: number;
  /** Positions of the view whose KV is written by the steps enqueued so far. */
  enqueued = 0;
  /** Tokens that have left the view, because the context window was full. */
  droppedTokens = 0;
  /** Tokens that steps in flight will choose. */
  pendingTokens = 0;
  /** Row of the device's token buffer while running, else -1. */
  slot = -1;
  /** Its place in the cache's queue while it waits. */
  queued: QueuedPrompt | null = null;
  table: BlockTable | null = null;
  /** Copies under way into the table's blocks. */
  loads: readonly LayerTransfer[] = [];
  finishReason: FinishReason | null = null;
  preemptions = 0;
  /** Whoever answers for its blocks has been told of them. */
  isAnnounced = false;
  /** Blocks that it had computed when it had to give its table back. */
  leftBlockIds: readonly string[] = [];
  /** Of the first time it was opened: a resumed sequence reports what its client's prompt found. */
  #opened: OpenedSequence | null = null;
  #isViewRestarted = false;
  #fetchStartedAtMs: number | null = null;
  #openedAtMs: number | null = null;
  #startedAtMs: number | null = null;
  #firstTokenAtMs: number | null = null;

  constructor(
    readonly request: EngineRequest,
    readonly choice: number,
    /** Names its blocks. */
    readonly chain: BlockChain,
    /** Computes the same prompt first; this one waits to share its blocks. */
    readonly leader: Sequence | null,
  ) {
    this.#memory = withRoom(request.tokens);
    this.#tokens = this.#memory.subarray(0, request.tokens.length);
    this.promptLength = request.tokens.length;
    this.seed = seedOfChoice(request.sampling.seed, choice);
  }

  /** Prompt and completion so far; ask again when a token has been appended. */
  get tokens(): Int32Array {
    return this.#tokens;
  }

  get biasCount(): number {
    return this.request.sampling.logitBias.length;
  }

  get completionLength(): number {
    return this.tokens.length - this.promptLength;
  }

  /** Length once the steps in flight have chosen their tokens. */
  get lengthAhead(): number {
    return this.tokens.length + this.pendingTokens;
  }

  /** Positions of the view that known tokens and those of the steps in flight take. */
  get viewLengthAhead(): number {
    return this.lengthAhead - this.droppedTokens;
  }

  /** Positions of the view whose tokens are known and whose KV is written by the steps enqueued so far. */
  get committable(): number {
    return Math.min(this.enqueued, this.tokens.length - this.droppedTokens);
  }

  /** Known tokens that no step computes yet. More than one: prefill; one: decode. */
  get tokensToCompute(): number {
    return this.viewLengthAhead - this.enqueued;
  }

  /** Every token of the prompt (and of what was generated before a preemption) is enqueued. */
  get isPrefilled(): boolean {
    return this.enqueued + this.droppedTokens >= this.promptLength;
  }

  /** With the steps in flight it reaches its last token: no further row may be enqueued. */
  get isLastTokenPending(): boolean {
    return this.lengthAhead - this.promptLength >= this.request.maxTokens;
  }

  /** May give rows to a step now. */
  get isSchedulable(): boolean {
    return this.state === "running" && !this.isLastTokenPending && this.tokensToCompute > 0;
  }

  /** Blocks that were cached for it are being read from disk. */
  markFetching(nowMs: number): void {
    this.#fetchStartedAtMs ??= nowMs;
  }

  open(opened: OpenedSequence, droppedTokens: number, nowMs: number): void {
    this.table = opened.table;
    this.loads = opened.loads;
    this.enqueued = opened.length;
    this.droppedTokens = droppedTokens;
    this.#opened ??= opened;
    this.#isViewRestarted ||= opened.table.chain.firstDrops > 0;
    this.#openedAtMs ??= nowMs;
  }

  /** It has no blocks any more. */
  forgetTable(): void {
    this.table = null;
    this.loads = [];
    this.enqueued = 0;
    this.droppedTokens = 0;
  }

  markStarted(nowMs: number): void {
    this.#startedAtMs ??= nowMs;
  }

  append(token: number, nowMs: number): void {
    assert(this.pendingTokens > 0, "a token nobody asked for");
    this.pendingTokens--;
    const { length } = this.tokens;
    if (length === this.#memory.length) this.#memory = withRoom(this.tokens);
    this.#memory[length] = token;
    this.#tokens = this.#memory.subarray(0, length + 1);
    this.#firstTokenAtMs ??= nowMs;
  }

  get cached(): CachedTokens {
    return this.#opened?.cached ?? NO_CACHED_TOKENS;
  }

  timings(nowMs: number): Timings {
    const { receivedAtMs } = this.request;
    const startedAtMs = this.#startedAtMs ?? nowMs;
    const firstTokenAtMs = this.#firstTokenAtMs ?? nowMs;
    return {
      queueMs: startedAtMs - receivedAtMs,
      loadMs: this.#loadMs(),
      prefillMs: firstTokenAtMs - startedAtMs,
      ttftMs: firstTokenAtMs - receivedAtMs,
      totalMs: nowMs - receivedAtMs,
    };
  }

  /** Prompt tokens that had to be computed, by reason. The last one always has to be. */
  missReasons(): Record<string, number> {
    const reasons = Object.fromEntries(this.#opened?.missReasons ?? []);
    const absent = (reasons["absent"] ?? 0) + 1;
    const rewritten = Math.min(absent, this.request.rewrittenTokens);
    if (rewritten > 0) reasons["template_rewrote"] = rewritten;
    if (absent > rewritten) reasons["absent"] = absent - rewritten;
    else delete reasons["absent"];
    return reasons;
  }

  /** `droppedTokens`: what had left the view at the end. */
  cacheReport(droppedTokens: number): CacheReport {
    const opened = this.#opened;
    return {
      choice: opened === null ? "none" : choiceOf(opened),
      predictedLoadMs: opened?.predictedLoadMs ?? null,
      predictedRecomputeMs: opened?.predictedRecomputeMs ?? null,
      loadedBytes: opened?.loadedBytes ?? 0,
      droppedTokens,
      isViewRestarted: this.#isViewRestarted,
    };
  }

  /** From the first read or load to the end of the last load. */
  #loadMs(): number {
    if (this.#opened === null || this.#openedAtMs === null) return 0;
    const endedAtMs = Math.max(
      this.#openedAtMs,
      ...this.#opened.loads.map((load) => load.endedAtMs ?? this.#firstTokenAtMs ?? this.#openedAtMs!),
    );
    return endedAtMs - (this.#fetchStartedAtMs ?? this.#openedAtMs);
  }
}

function choiceOf({ length, loadedBytes, missReasons }: OpenedSequence): CacheReport["choice"] {
  const isCut = missReasons.has("recompute_cheaper");
  if (loadedBytes > 0) return isCut ? "split" : "load";
  if (isCut) return length > 0 ? "split" : "recompute";
  return length > 0 ? "resident" : "none";
}

/** A copy with room for half as many again. As memory, not as an array of numbers, 8K tokens cost a microsecond. */
function withRoom(tokens: Int32Array): Int32Array {
  const memory = new Int32Array(tokens.length + (tokens.length >> 1) + 64);
  memory.set(tokens);
  return memory;
}

/** Seeds have 53 bits and wrap, so that the choices of the largest ones differ too. */
function seedOfChoice(seed: number, choice: number): number {
  return Number(BigInt.asUintN(53, BigInt(seed) + BigInt(choice)));
}
