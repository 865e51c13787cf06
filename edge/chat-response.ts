// Answers in OpenAI's exact shapes: the JSON object, and the chunks of a stream. What differs between
// the chunks of one stream is little, so the rest is made once; a chunk is a few string joins.

import type { StoredTurn } from "../db/turns.ts";
import type { Done, FinishReason, TokenLogprob } from "../sidecar/protocol.ts";
import type { ChoiceDelta } from "./completion-stream.ts";
import type { ErrorBody } from "./errors.ts";

/** What all parts of one answer share. */
export type AnswerHead = {
  id: string;
  /** Unix seconds. */
  created: number;
  model: string;
};

/** How an answer ended. */
export type Outcome = {
  done: Done;
  sidecar: string;
  /** Null without a conversation. */
  turn: (StoredTurn & { conversationId: string }) | null;
};

export type ChoiceAnswer = { text: string; logprobs: TokenLogprob[] | null };

/** The body of a `chat.completion`. */
export function completionBody(head: AnswerHead, choices: ChoiceAnswer[], outcome: Outcome): object {
  return {
    id: head.id,
    object: "chat.completion",
    created: head.created,
    model: head.model,
    choices: choices.map(({ text, logprobs }, index) => ({
      index,
      message: { role: "assistant", content: text, refusal: null },
      logprobs: logprobs === null ? null : logprobsBody(logprobs),
      finish_reason: finishReason(outcome.done.finishReasons[index]),
    })),
    usage: usageBody(outcome.done),
    ...extensions(outcome),
  };
}

/** Writes the server-sent events of one stream. */
export class ChunkWriter {
  readonly #start: string;
  /** What follows the choices: `usage: null` where the last chunk will bring it. */
  readonly #end: string;

  constructor(head: AnswerHead, includeUsage: boolean) {
    const { id, created, model } = head;
    const fields = JSON.stringify({ id, object: "chat.completion.chunk", created, model });
    this.#start = `data: ${fields.slice(0, -1)},"choices":[`;
    this.#end = includeUsage ? `],"usage":null}\n\n` : `]}\n\n`;
  }

  /** First chunk of a choice. */
  role(choice: number): string {
    const delta = `{"role":"assistant","content":"","refusal":null}`;
    const fields = `{"index":${choice},"delta":${delta},"logprobs":null,"finish_reason":null}`;
    return `${this.#start}${fields}${this.#end}`;
  }

  /** New text; "" for a delta that has nothing to show yet. */
  content({ choice, text, logprobs }: ChoiceDelta): string {
    if (text === "" && logprobs === null) return "";
    const probs = logprobs === null ? "null" : JSON.stringify(logprobsBody(logprobs));
    return (
      `${this.#start}{"index":${choice},"delta":{"content":${JSON.stringify(text)}},` +
      `"logprobs":${probs},"finish_reason":null}${this.#end}`
    );
  }

  /** Last chunk of a choice; the one of the last choice says what was stored. */
  finish(choice: number, outcome: Outcome): string {
    const { finishReasons } = outcome.done;
    const finish_reason = finishReason(finishReasons[choice]);
    const choices = JSON.stringify({ index: choice, delta: {}, logprobs: null, finish_reason });
    const isLast = choice === finishReasons.length - 1;
    const extra = isLast ? `,${JSON.stringify(extensions(outcome)).slice(1, -1)}` : "";
    return `${this.#start}${choices}${this.#end.replace("]", `]${extra}`)}`;
  }

  /** The chunk without choices that `include_usage` asks for. */
  usage(outcome: Outcome): string {
    return `${this.#start}],"usage":${JSON.stringify(usageBody(outcome.done))}}\n\n`;
  }
}

export const STREAM_END = "data: [DONE]\n\n";
export const KEEP_ALIVE = ": keep-alive\n\n";

/** An error after the stream has begun. */
export function errorEvent(body: ErrorBody): string {
  return `data: ${JSON.stringify(body)}\n\n`;
}

function usageBody({ usage }: Done): object {
  const { promptTokens, completionTokens, cachedTokens } = usage;
  return {
    prompt_tokens: promptTokens,
    completion_tokens: completionTokens,
    total_tokens: promptTokens + completionTokens,
    prompt_tokens_details: {
      cached_tokens: cachedTokens.gpu + cachedTokens.host + cachedTokens.disk,
      audio_tokens: 0,
    },
    completion_tokens_details: {
      reasoning_tokens: 0,
      audio_tokens: 0,
      accepted_prediction_tokens: 0,
      rejected_prediction_tokens: 0,
    },
  };
}

/** Beyond OpenAI's shape: where the tokens came from, how long it took, and what was stored. */
function extensions({ done, sidecar, turn }: Outcome): object {
  const { cache, timings } = done;
  const kvasir = {
    sidecar,
    cached_tokens: done.usage.cachedTokens,
    miss_reasons: done.missReasons,
    cache: {
      choice: cache.choice,
      predicted_load_ms: cache.predictedLoadMs,
      predicted_recompute_ms: cache.predictedRecomputeMs,
      loaded_bytes: cache.loadedBytes,
      dropped_tokens: cache.droppedTokens,
      view_restarted: cache.isViewRestarted,
    },
    timings: {
      queue_ms: timings.queueMs,
      load_ms: timings.loadMs,
      prefill_ms: timings.prefillMs,
      ttft_ms: timings.ttftMs,
      total_ms: timings.totalMs,
    },
  };
  if (turn === null) return { kvasir };
  return {
    conversation: { id: turn.conversationId },
    message_ids: { input: turn.inputIds, output: turn.outputIds },
    kvasir,
  };
}

function logprobsBody(logprobs: TokenLogprob[]): object {
  return {
    content: logprobs.map(({ token, bytes, logprob, top }) => ({
      token,
      logprob,
      bytes,
      top_logprobs: top.map((rival) => ({
        token: rival.token,
        logprob: rival.logprob,
        bytes: rival.bytes,
      })),
    })),
    refusal: null,
  };
}

/** A choice that the sidecar cut short reads as "length": OpenAI has no word for it. */
function finishReason(reason: FinishReason | undefined): "stop" | "length" {
  return reason === "stop" ? "stop" : "length";
}
