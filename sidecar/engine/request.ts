// What main and engine worker say to each other: requests in, events out. Plain data, structured-cloned.

import type { Keep } from "../kvcache/policy.ts";
import type { CacheReport, ErrorCode, FinishReason, Timings, Usage } from "../protocol.ts";

/** How tokens are chosen; text-level things (stop strings) are the main thread's business. */
export interface EngineSampling {
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly seed: number;
  readonly frequencyPenalty: number;
  readonly presencePenalty: number;
  readonly repetitionPenalty: number;
  readonly logitBias: readonly (readonly [number, number])[];
  readonly logprobs: number | null;
  readonly ignoreEos: boolean;
}

export interface EngineRequest {
  /** Unique in this process. */
  readonly id: number;
  readonly tokens: Int32Array;
  readonly salt: Uint8Array;
  readonly sampling: EngineSampling;
  /** Choices wanted; choice i samples with seed + i. */
  readonly choiceCount: number;
  /** Most tokens per choice; already clamped to what the context holds. */
  readonly maxTokens: number;
  /** Tokens may leave the view when the context window is full; else prompt and answer fit it. */
  readonly isTruncating: boolean;
  /** Prompt tokens that are new only because the template has written an earlier turn otherwise. */
  readonly rewrittenTokens: number;
  /** How the conversation's blocks wish to be kept. */
  readonly keep: Keep;
  /** Somebody answers for its blocks, and has to know of them before the cache has them: see BegunEvent. */
  readonly isHeld: boolean;
  /** performance.timeOrigin-based ms at which the request entered the sidecar, and at which it expires. */
  readonly receivedAtMs: number;
  readonly deadlineAtMs: number;
}

/** A choice of a held request is about to be computed: whatever becomes of it, the cache may have these blocks of its
 * prompt from now on, and others that continue them. */
export interface BegunEvent {
  readonly type: "begun";
  readonly request: number;
  /** From the prompt's first block to its last. */
  readonly blockIds: readonly string[];
}

/** One chosen token. */
export interface TokenEvent {
  readonly type: "token";
  readonly request: number;
  readonly choice: number;
  readonly token: number;
  readonly logprob: number;
  readonly top: readonly { id: number; logprob: number }[];
}

/** The last event of a choice; `tokens` are its prompt and completion, an end token included. */
export interface FinishEvent {
  readonly type: "finish";
  readonly request: number;
  readonly choice: number;
  readonly reason: FinishReason;
  readonly usage: Usage;
  readonly timings: Timings;
  readonly cache: CacheReport;
  readonly missReasons: Readonly<Record<string, number>>;
  readonly tokens: Int32Array;
  /** All blocks that the choice leaves in the cache, its prompt's included. */
  readonly blockIds: readonly string[];
}

/** The request ends without an answer; no further event of it follows. */
export interface FailEvent {
  readonly type: "fail";
  readonly request: number;
  readonly code: ErrorCode;
  readonly message: string;
  readonly retryAfterS: number | null;
  /** All blocks that it leaves in the cache. */
  readonly blockIds: readonly string[];
}

export type EngineEvent = BegunEvent | TokenEvent | FinishEvent | FailEvent;

/** Milliseconds on a clock that all threads of the process share and that never steps back. */
export function nowMs(): number {
  return performance.timeOrigin + performance.now();
}
