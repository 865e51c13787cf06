// The body of POST /v1/chat/completions: OpenAI's fields as far as the models can do them, and ours.
// Fields that we do not know are ignored, as clients send many; fields that ask for what we cannot do
// are refused, because an answer that ignores them would be wrong. In `kvasir`, which is ours alone, a
// field that we do not know is a mistake, and refused.

import { z } from "@hono/zod-openapi";
import type { ChatMessage, SamplingParams, SubmitRequest } from "../sidecar/protocol.ts";
import { LIMITS } from "./config.ts";

const UNSTORABLE = "must be well-formed Unicode without NUL characters";

/** Text that Postgres can store and UTF-8 can carry. */
export const storableText = z
  .string()
  .refine((text) => text.isWellFormed() && !text.includes("\0"), { error: UNSTORABLE });

const CONTENT_ERROR =
  'must be a string or an array of parts {"type": "text", "text": "..."}; other parts are not supported';

/** A string, or text parts that are joined. */
export function textContent(partTypes: readonly [string, ...string[]]) {
  const part = z.object({ type: z.enum(partTypes), text: storableText });
  const parts = z.array(part).min(1);
  return z
    .union([storableText, parts], {
      error: ({ input }) => (typeof input === "string" ? UNSTORABLE : CONTENT_ERROR),
    })
    .transform((content) =>
      typeof content === "string" ? content : content.map(({ text }) => text).join(""),
    );
}

export const ROLES = ["system", "developer", "user", "assistant", "tool"] as const;

/** Before `content` in a message: one that calls tools has none, and is refused for the calls. */
export const noCalls = {
  tool_calls: absent("tool calls are"),
  function_call: absent("function calls are"),
};

const message = z.object({
  role: z.enum(ROLES, { error: `must be one of ${ROLES.join(", ")}` }),
  ...noCalls,
  content: textContent(["text"]),
  name: storableText.max(64).optional(),
});

const logitBias = z.record(
  z.string().regex(/^\d{1,9}$/, { error: "keys must be token ids" }),
  z.number().min(-100).max(100),
);

/**
 * OpenAI allows any integer; the sidecar wants none below 0, and counts up from it for the other
 * choices, which must stay exact.
 */
const SEED_END = 2 ** 52;
const seed = z.int().transform((value) => ((value % SEED_END) + SEED_END) % SEED_END);

const maxTokens = z
  .number()
  .min(1)
  .refine(Number.isInteger, { error: "must be an integer" })
  .openapi({ type: ["integer", "null"], minimum: 1 });

const stopString = storableText.min(1).max(512);
const stopStrings = z.array(stopString).max(16, { error: "at most 16 stop strings are supported" });

export const chatRequest = z
  .object({
    model: z.string().min(1),
    messages: z.array(message).min(1).max(LIMITS.messages),
    stream: z.boolean().nullish(),
    stream_options: z.object({ include_usage: z.boolean().nullish() }).nullish(),
    temperature: z.number().min(0).max(2).nullish(),
    top_p: z.number().min(0).max(1).nullish(),
    n: z.int().min(1).max(16).nullish(),
    stop: z
      .union([stopString, stopStrings], {
        error: "must be a string or an array of at most 16 strings of 1 to 512 characters",
      })
      .nullish(),
    max_tokens: maxTokens.nullish(),
    max_completion_tokens: maxTokens.nullish(),
    seed: seed.nullish(),
    frequency_penalty: z.number().min(-2).max(2).nullish(),
    presence_penalty: z.number().min(-2).max(2).nullish(),
    logit_bias: logitBias
      .refine((bias) => Object.keys(bias).length <= 1024, { error: "at most 1024 tokens" })
      .nullish(),
    logprobs: z.boolean().nullish(),
    top_logprobs: z.int().min(0).max(20).nullish(),
    response_format: z
      .object({ type: z.literal("text", { error: 'only {"type": "text"} is supported' }) })
      .nullish(),
    tools: absentList("tools are"),
    functions: absentList("functions are"),
    tool_choice: z.enum(["none", "auto"], { error: "tools are not supported" }).nullish(),
    function_call: z.enum(["none", "auto"], { error: "functions are not supported" }).nullish(),
    web_search_options: absent("web search is"),
    audio: absent("audio is"),
    modalities: z.array(z.literal("text", { error: "only text is supported" })).nullish(),
    // Beyond OpenAI's.
    top_k: z.int().min(0).nullish(),
    min_p: z.number().min(0).max(1).nullish(),
    repetition_penalty: z.number().gt(0).max(10).nullish(),
    ignore_eos: z.boolean().nullish(),
    conversation: z
      .union([z.string(), z.object({ id: z.string() })])
      .nullish()
      .describe("the conversation to append this turn to; messages are then the new ones"),
    truncation: z
      .enum(["auto", "disabled"])
      .nullish()
      .describe("when the context is full: drop its oldest part, or refuse"),
    kvasir: z
      .strictObject({
        cache_ttl_s: z
          .int()
          .min(0)
          .max(2 ** 31)
          .nullish()
          .describe("seconds of idleness after which the conversation's cache may go"),
        priority: z
          .int()
          .min(-10)
          .max(10)
          .nullish()
          .describe("keep this conversation's cache longer (above 0) or less long (below) than others'"),
        parent_message_id: z
          .string()
          .nullish()
          .describe("branch from this message instead of the conversation's last one"),
      })
      .nullish(),
  })
  .refine((body) => body.top_logprobs == null || body.logprobs === true, {
    error: "needs logprobs: true",
    path: ["top_logprobs"],
  })
  .refine((body) => body.stream_options == null || body.stream === true, {
    error: "needs stream: true",
    path: ["stream_options"],
  })
  .refine((body) => body.kvasir?.parent_message_id == null || body.conversation != null, {
    error: "needs conversation",
    path: ["kvasir", "parent_message_id"],
  })
  .openapi("CreateChatCompletionRequest");

export type ChatRequest = z.output<typeof chatRequest>;

/** Id of the named conversation, or null. */
export function conversationId({ conversation }: ChatRequest): string | null {
  if (conversation === null || conversation === undefined) return null;
  return typeof conversation === "string" ? conversation : conversation.id;
}

export function chatMessages({ messages }: ChatRequest): ChatMessage[] {
  return messages.map(({ role, content, name }) =>
    name === undefined ? { role, content } : { role, content, name },
  );
}

/** What the sidecar is asked, but for the messages' history. */
export function submitRequest(
  chat: ChatRequest,
  limits: { salt: SubmitRequest["salt"]; maxModelLen: number; deadlineMs: number },
): SubmitRequest {
  return {
    salt: limits.salt,
    conversation: conversationId(chat),
    model: chat.model,
    messages: chatMessages(chat),
    sampling: samplingParams(chat, limits.maxModelLen),
    deadlineMs: limits.deadlineMs,
    truncation: chat.truncation ?? "auto",
    cacheTtlS: chat.kvasir?.cache_ttl_s ?? null,
    priority: chat.kvasir?.priority ?? 0,
  };
}

/** Smallest top_p the sidecar takes: keeps the most likely token, as OpenAI's 0 does. */
const TOP_P_MIN = 1e-6;

function samplingParams(chat: ChatRequest, maxModelLen: number): SamplingParams {
  const max = chat.max_completion_tokens ?? chat.max_tokens ?? null;
  const stop = chat.stop ?? [];
  return {
    temperature: chat.temperature ?? 1,
    topP: Math.max(chat.top_p ?? 1, TOP_P_MIN),
    topK: chat.top_k ?? 0,
    minP: chat.min_p ?? 0,
    seed: chat.seed ?? randomSeed(),
    frequencyPenalty: chat.frequency_penalty ?? 0,
    presencePenalty: chat.presence_penalty ?? 0,
    repetitionPenalty: chat.repetition_penalty ?? 1,
    logitBias: Object.entries(chat.logit_bias ?? {}).map(([id, bias]) => [Number(id), bias]),
    logprobs: chat.logprobs === true ? (chat.top_logprobs ?? 0) : null,
    n: chat.n ?? 1,
    stop: typeof stop === "string" ? [stop] : stop,
    maxTokens: max === null ? null : Math.min(max, maxModelLen),
    ignoreEos: chat.ignore_eos ?? false,
  };
}

/** 52 random bits. */
function randomSeed(): number {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (high! & 0xfffff) * 2 ** 32 + low!;
}

/** A field that must not be there. */
function absent(what: string) {
  return z.null({ error: `${what} not supported` }).optional();
}

/** A list that must be empty. */
function absentList(what: string) {
  return z.array(z.unknown()).max(0, { error: `${what} not supported` }).nullish();
}
