// What the API answers, for /openapi.json. The handlers build these objects by hand, because the
// token path must not validate; the tests hold them against these schemas.

import { z } from "@hono/zod-openapi";
import { CACHE_CHOICES } from "../sidecar/protocol.ts";

const tokenLogprob = z.object({
  token: z.string(),
  logprob: z.number(),
  bytes: z.array(z.int()).nullable(),
  top_logprobs: z.array(
    z.object({ token: z.string(), logprob: z.number(), bytes: z.array(z.int()).nullable() }),
  ),
});

const usage = z.object({
  prompt_tokens: z.int(),
  completion_tokens: z.int(),
  total_tokens: z.int(),
  prompt_tokens_details: z.object({ cached_tokens: z.int(), audio_tokens: z.int() }),
  completion_tokens_details: z.object({
    reasoning_tokens: z.int(),
    audio_tokens: z.int(),
    accepted_prediction_tokens: z.int(),
    rejected_prediction_tokens: z.int(),
  }),
});

const byTier = z.object({ gpu: z.int(), host: z.int(), disk: z.int() });

/** Beyond OpenAI's shape. */
const extensions = z.object({
  sidecar: z.string(),
  cached_tokens: byTier.describe("prompt tokens served from cache, by tier"),
  miss_reasons: z.record(z.string(), z.int()).describe("prompt tokens not served from cache, by reason"),
  cache: z
    .object({
      choice: z.enum(CACHE_CHOICES),
      predicted_load_ms: z.number().nullable(),
      predicted_recompute_ms: z.number().nullable(),
      loaded_bytes: z.int(),
      dropped_tokens: z.int().describe("left the view, because the context window was full"),
      view_restarted: z.boolean().describe("a view that had dropped tokens was lost, and computed afresh"),
    })
    .describe("what was done about the cached part of the prompt, and what had been expected"),
  timings: z.object({
    queue_ms: z.number(),
    load_ms: z.number(),
    prefill_ms: z.number(),
    ttft_ms: z.number(),
    total_ms: z.number(),
  }),
});

export const chatCompletion = z
  .strictObject({
    id: z.string(),
    object: z.literal("chat.completion"),
    created: z.int(),
    model: z.string(),
    choices: z.array(
      z.strictObject({
        index: z.int(),
        message: z.strictObject({
          role: z.literal("assistant"),
          content: z.string(),
          refusal: z.null(),
        }),
        logprobs: z
          .strictObject({ content: z.array(tokenLogprob), refusal: z.null() })
          .nullable(),
        finish_reason: z.enum(["stop", "length"]),
      }),
    ),
    usage,
    conversation: z.strictObject({ id: z.string() }).optional(),
    message_ids: z
      .strictObject({ input: z.array(z.string()), output: z.array(z.string()) })
      .optional()
      .describe("where the turn was stored; output has one id per choice"),
    kvasir: extensions,
  })
  .openapi("ChatCompletion");

export const model = z
  .strictObject({
    id: z.string(),
    object: z.literal("model"),
    created: z.int(),
    owned_by: z.string(),
    max_model_len: z.int().describe("tokens of prompt and answer together"),
  })
  .openapi("Model");

export const modelList = z
  .strictObject({ object: z.literal("list"), data: z.array(model) })
  .openapi("ModelList");

const conversationFields = {
  id: z.string(),
  object: z.literal("conversation"),
  created_at: z.int(),
  metadata: z.record(z.string(), z.string()),
  head_message_id: z.string().nullable(),
};

const message = z.strictObject({
  id: z.string(),
  object: z.literal("conversation.message"),
  role: z.string(),
  name: z.string().optional(),
  content: z.string(),
  parent_id: z.string().nullable(),
  token_count: z.int().nullable(),
  created_at: z.int(),
});

export const conversation = z.strictObject(conversationFields).openapi("Conversation");

export const conversationWithMessages = z
  .strictObject({
    ...conversationFields,
    messages: z.array(message).describe("the current branch, from its first message to its head"),
  })
  .openapi("ConversationWithMessages");

export const conversationList = z
  .strictObject({
    object: z.literal("list"),
    data: z.array(conversation),
    first_id: z.string().nullable(),
    last_id: z.string().nullable(),
    has_more: z.boolean(),
  })
  .openapi("ConversationList");

export const conversationDeleted = z
  .strictObject({
    id: z.string(),
    object: z.literal("conversation.deleted"),
    deleted: z.literal(true),
    kvasir: z.strictObject({
      blocks: z.record(z.string(), z.int()).describe("cache blocks removed, by tier"),
      pending_sidecars: z.array(z.string()).describe("will forget when they are back"),
    }),
  })
  .openapi("ConversationDeleted");

export const health = z.strictObject({ status: z.literal("ok") });

export const readiness = z
  .strictObject({
    status: z.enum(["ready", "not_ready"]),
    database: z.boolean(),
    sidecars: z.array(
      z.strictObject({ name: z.string(), ready: z.boolean(), model: z.string().nullable() }),
    ),
    draining: z.boolean(),
  })
  .openapi("Readiness");

export const errorResponse = z
  .strictObject({
    error: z.strictObject({
      message: z.string(),
      type: z.string(),
      param: z.string().nullable(),
      code: z.string(),
    }),
  })
  .openapi("ErrorResponse");
