// One choice of one request, from the queue to its last token. Its tokens are prompt + completion; of these the first
// `enqueued` have their KV computed by steps already given to the device.

import { assert } from "../assert.ts";
import type { BlockChain } from "../kvcache/block-chain.ts";
import type { BlockTable, CachedTokens } from "../kvcache/kv-cache.ts";
import type { FinishReason, Timings } from "../protocol.ts";
import type { EngineRequest } from "./request.ts";

export type SequenceState = "waiting" | "running" | "finished";

const NO_CACHED_TOKENS: CachedTokens = { gpu: 0, host: 0, disk: 0 };

export class Sequence {
  state: SequenceState = "waiting";
  readonly tokens: number[];
  readonly promptLength: number;
  readonly seed: number;
  /** Tokens whose KV is written by the steps enqueued so far. */
  enqueued = 0;
  /** Tokens that steps in flight will choose. */
  pendingTokens = 0;
  /** Row of the device's token buffer while running, else -1. */
  slot = -1;
  table: BlockTable | null = null;
  /** Of the first time it was opened: a resumed sequence reports what its client's prompt found. */
  cached: CachedTokens = NO_CACHED_TOKENS;
  finishReason: FinishReason | null = null;
  preemptions = 0;
  #startedAtMs: number | null = null;
  #firstTokenAtMs: number | null = null;

  constructor(
    readonly request: EngineRequest,
    readonly choice: number,
    /** Ids of its blocks. */
    readonly chain: BlockChain,
    /** Computes the same prompt first; this one waits to share its blocks. */
    readonly leader: Sequence | null,
  ) {
    this.tokens = Array.from(request.tokens);
    this.promptLength = request.tokens.length;
    this.seed = seedOfChoice(request.sampling.seed, choice);
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

  /** Known tokens that no step computes yet. More than one: prefill; one: decode. */
  get tokensToCompute(): number {
    return this.lengthAhead - this.enqueued;
  }

  /** Every token of the prompt (and of what was generated before a preemption) is enqueued. */
  get isPrefilled(): boolean {
    return this.enqueued >= this.promptLength;
  }

  /** With the steps in flight it reaches its last token: no further row may be enqueued. */
  get isLastTokenPending(): boolean {
    return this.lengthAhead - this.promptLength >= this.request.maxTokens;
  }

  /** May give rows to a step now. */
  get isSchedulable(): boolean {
    return this.state === "running" && !this.isLastTokenPending && this.tokensToCompute > 0;
  }

  markStarted(nowMs: number): void {
    this.#startedAtMs ??= nowMs;
  }

  append(token: number, nowMs: number): void {
    assert(this.pendingTokens > 0, "a token nobody asked for");
    this.pendingTokens--;
    this.tokens.push(token);
    this.#firstTokenAtMs ??= nowMs;
  }

  timings(nowMs: number): Timings {
    const { receivedAtMs } = this.request;
    const startedAtMs = this.#startedAtMs ?? nowMs;
    const firstTokenAtMs = this.#firstTokenAtMs ?? nowMs;
    return {
      queueMs: startedAtMs - receivedAtMs,
      loadMs: 0,
      prefillMs: firstTokenAtMs - startedAtMs,
      ttftMs: firstTokenAtMs - receivedAtMs,
      totalMs: nowMs - receivedAtMs,
    };
  }
}

/** Seeds have 53 bits and wrap, so that the choices of the largest ones differ too. */
function seedOfChoice(seed: number, choice: number): number {
  return Number(BigInt.asUintN(53, BigInt(seed) + BigInt(choice)));
}
