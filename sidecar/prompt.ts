// From a submitted request to what the engine wants: the template renders the messages, lineage and tokenizer turn the
// text into ids, and everything that cannot work is refused here with a reason for the client.

import type { EngineSampling } from "./engine/request.ts";
import type { Lineage } from "./lineage.ts";
import type { ChatTemplate } from "./model/chat-template.ts";
import type { Tokenizer } from "./model/tokenizer.ts";
import type { ChatMessage, ErrorCode, SamplingParams, SubmitRequest } from "./protocol.ts";
import { TemplateRewrites } from "./template-rewrites.ts";

/** An answer that the client gets instead of tokens. */
export class RequestError extends Error {
  override name = "RequestError";
  constructor(
    readonly code: ErrorCode,
    message: string,
    readonly retryAfterS: number | null = null,
  ) {
    super(message);
  }
}

export interface Prompt {
  readonly text: string;
  readonly tokens: Int32Array;
  /** What the client asked for, at most what the context still holds. */
  readonly maxTokens: number;
  /** Tokens that an earlier turn had and that the template has written anew since. */
  readonly rewrittenTokens: number;
}

export interface PromptLimits {
  readonly modelId: string;
  /** Tokens of prompt and completion together. */
  readonly maxModelLen: number;
  readonly vocabSize: number;
}

/**
 * Most characters of a request's messages for each token of the context. Where in a conversation blocks leave the view
 * depends on how many tokens there are from its start on, so even text that has left must be encoded; and a tokenizer
 * takes seconds for millions of characters, while other long prompts wait. Without truncation what is refused would not
 * fit; with it, this is where a conversation of very much text ends.
 */
const CHARACTERS_PER_CONTEXT_TOKEN_MAX = 256;

/** Conversations whose last text is remembered, to see when a template changes it; some 100 bytes each. */
const REWRITES_MAX = 20_000;

export class PromptBuilder {
  readonly #rewrites = new TemplateRewrites(REWRITES_MAX);

  constructor(
    readonly template: ChatTemplate,
    readonly tokenizer: Tokenizer,
    readonly lineage: Lineage,
    readonly limits: PromptLimits,
  ) {}

  /** Throws RequestError. */
  async build(request: SubmitRequest): Promise<Prompt> {
    if (request.model !== this.limits.modelId) {
      throw new RequestError("invalid_request", `this sidecar serves ${this.limits.modelId}, not ${request.model}`);
    }
    checkSampling(request.sampling, this.limits.vocabSize);
    checkLength(request.messages, this.limits.maxModelLen);
    const text = this.#render(request);
    const { tokens, knownTokens } = await this.lineage.resolve(request.salt, text, (part) =>
      this.tokenizer.encodeAsync(part),
    );
    const rewrittenTokens = this.#rewrites.count(request.salt, request.messages, text, knownTokens);
    return { text, tokens, maxTokens: this.#maxTokens(tokens.length, request), rewrittenTokens };
  }

  /** A turn has ended: its messages and this answer have this text, and these tokens. */
  noteEnd({ salt, messages }: SubmitRequest, answer: string, text: string, tokens: Int32Array): void {
    this.#rewrites.note(salt, messages, answer, text, tokens.length);
  }

  #render(request: SubmitRequest): string {
    try {
      return this.template.render(request.messages, { addGenerationPrompt: true });
    } catch (error) {
      throw new RequestError("invalid_request", `the model's chat template refused: ${(error as Error).message}`);
    }
  }

  #maxTokens(promptLength: number, { sampling, truncation }: SubmitRequest): number {
    const { maxModelLen } = this.limits;
    const wanted = sampling.maxTokens;
    const room = maxModelLen - promptLength;
    if (promptLength === 0) throw new RequestError("invalid_request", "the prompt is empty");
    // Old tokens leave the view when it is full, so an answer could go on for ever: at most one window of it.
    if (truncation === "auto") return Math.min(wanted ?? Math.max(room, Math.ceil(maxModelLen / 2)), maxModelLen);
    if (room < 1) {
      throw new RequestError(
        "context_length_exceeded",
        `This model's maximum context length is ${this.limits.maxModelLen} tokens, ` +
          `but the messages come to ${promptLength}. Shorten the messages, or send truncation: "auto".`,
      );
    }
    return Math.min(wanted ?? room, room);
  }
}

export function engineSampling(params: SamplingParams): EngineSampling {
  const { temperature, topK, topP, minP, seed, frequencyPenalty, presencePenalty } = params;
  const { repetitionPenalty, logitBias, logprobs, ignoreEos } = params;
  return {
    temperature,
    topK,
    topP,
    minP,
    seed,
    frequencyPenalty,
    presencePenalty,
    repetitionPenalty,
    logitBias,
    logprobs,
    ignoreEos,
  };
}

function checkLength(messages: readonly ChatMessage[], maxModelLen: number): void {
  const length = messages.reduce((sum, { content }) => sum + content.length, 0);
  const max = maxModelLen * CHARACTERS_PER_CONTEXT_TOKEN_MAX;
  if (length <= max) return;
  throw new RequestError(
    "context_length_exceeded",
    `The messages have ${length} characters. At most ${max} are taken, ${CHARACTERS_PER_CONTEXT_TOKEN_MAX} for each ` +
      `of the ${maxModelLen} tokens of this model's context. Shorten the messages, or begin a new conversation.`,
  );
}

function checkSampling({ logitBias }: SamplingParams, vocabSize: number): void {
  const unknown = logitBias.find(([id]) => id >= vocabSize);
  if (unknown !== undefined) {
    throw new RequestError(
      "invalid_request",
      `logit_bias names token ${unknown[0]}; the vocabulary has ${vocabSize}`,
    );
  }
}
