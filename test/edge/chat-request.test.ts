// What a chat request may say, what it is turned into for the sidecar, and which part of it is new.

import { describe, expect, test } from "bun:test";
import { chatRequest, submitRequest } from "../../edge/chat-request.ts";
import { withoutHistory } from "../../edge/generation.ts";
import type { ChatMessage } from "../../sidecar/protocol.ts";

const base = { model: "m", messages: [{ role: "user", content: "hi" }] };
const limits = { salt: new Uint8Array(32), maxModelLen: 2048, deadlineMs: 1000 };

function submit(fields: object) {
  return submitRequest(chatRequest.parse({ ...base, ...fields }), limits);
}

/** Path and message of the first issue. */
function refusal(fields: object): string {
  const result = chatRequest.safeParse({ ...base, ...fields });
  if (result.success) throw new Error(`accepted: ${JSON.stringify(fields)}`);
  const issue = result.error.issues[0]!;
  return `${issue.path.join(".")}: ${issue.message}`;
}

describe("a chat request", () => {
  test("has OpenAI's defaults, and a seed of its own each time", () => {
    const { sampling, truncation, conversation, cacheTtlS } = submit({});
    expect(sampling).toEqual({
      temperature: 1,
      topP: 1,
      topK: 0,
      minP: 0,
      seed: expect.any(Number),
      frequencyPenalty: 0,
      presencePenalty: 0,
      repetitionPenalty: 1,
      logitBias: [],
      logprobs: null,
      n: 1,
      stop: [],
      maxTokens: null,
      ignoreEos: false,
    });
    expect({ truncation, conversation, cacheTtlS }).toEqual({
      truncation: "auto",
      conversation: null,
      cacheTtlS: null,
    });
    expect(Number.isSafeInteger(sampling.seed)).toBe(true);
    expect(submit({}).sampling.seed).not.toBe(sampling.seed);
  });

  test("carries every field to the sidecar", () => {
    const request = submit({
      temperature: 0,
      top_p: 0,
      top_k: 40,
      min_p: 0.1,
      seed: -1,
      frequency_penalty: 1,
      presence_penalty: -1,
      repetition_penalty: 1.1,
      logit_bias: { "7": -100 },
      logprobs: true,
      top_logprobs: 3,
      n: 2,
      stop: "END",
      max_tokens: 5,
      max_completion_tokens: 1e15,
      ignore_eos: true,
      truncation: "disabled",
      conversation: { id: "c" },
      kvasir: { cache_ttl_s: 60 },
    });
    expect(request.sampling).toEqual({
      temperature: 0,
      topP: 1e-6,
      topK: 40,
      minP: 0.1,
      seed: 2 ** 52 - 1,
      frequencyPenalty: 1,
      presencePenalty: -1,
      repetitionPenalty: 1.1,
      logitBias: [[7, -100]],
      logprobs: 3,
      n: 2,
      stop: ["END"],
      maxTokens: 2048,
      ignoreEos: true,
    });
    expect(request).toMatchObject({ truncation: "disabled", conversation: "c", cacheTtlS: 60 });
  });

  test("ignores what it does not know, and nulls", () => {
    const nulls = { temperature: null, stop: null, audio: null, stream_options: null, n: null };
    const request = submit({ user: "u", store: true, tools: [], ...nulls });
    expect(request.sampling.temperature).toBe(1);
  });

  test("joins the text parts of a message and keeps names", () => {
    const parts = [
      { type: "text", text: "a" },
      { type: "text", text: "b" },
    ];
    const { messages } = submit({ messages: [{ role: "tool", name: "t", content: parts }] });
    expect(messages).toEqual([{ role: "tool", name: "t", content: "ab" }]);
  });

  test("is refused, with the field's name, for each of these", () => {
    const cases: [object, string][] = [
      [{ messages: [] }, "messages: "],
      [{ messages: "hi" }, "messages: "],
      [{ messages: [{ role: "wizard", content: "" }] }, "messages.0.role: must be one of system"],
      [{ messages: [{ role: "user" }] }, "messages.0.content: must be a string or an array"],
      [{ messages: [{ role: "user", content: null }] }, "messages.0.content: must be a string"],
      [{ messages: [{ role: "user", content: [{ type: "image_url" }] }] }, "messages.0.content: "],
      [{ messages: [{ role: "user", content: "a\0b" }] }, "messages.0.content: must be well-formed"],
      [{ messages: [{ role: "user", content: "\ud800" }] }, "messages.0.content: must be well-formed"],
      [{ messages: [{ role: "assistant", content: "", tool_calls: [{}] }] }, "messages.0.tool_calls: "],
      [
        { messages: [{ role: "assistant", content: null, tool_calls: [{}] }] },
        "messages.0.tool_calls: tool calls are not supported",
      ],
      [{ messages: [{ role: "assistant", function_call: {} }] }, "messages.0.function_call: function calls are not"],
      [{ model: 5 }, "model: "],
      [{ max_tokens: -1 }, "max_tokens: "],
      [{ max_tokens: 0 }, "max_tokens: "],
      [{ max_tokens: 1.5 }, "max_tokens: must be an integer"],
      [{ max_completion_tokens: "5" }, "max_completion_tokens: "],
      [{ temperature: 2.1 }, "temperature: "],
      [{ top_p: -0.1 }, "top_p: "],
      [{ n: 17 }, "n: "],
      [{ stop: Array.from({ length: 10_000 }, () => "x") }, "stop: must be a string or an array"],
      [{ stop: "" }, "stop: "],
      [{ logit_bias: { "5": "NaN" } }, "logit_bias.5: "],
      [{ logit_bias: { "5": null } }, "logit_bias.5: "],
      [{ logit_bias: { "5": Number.POSITIVE_INFINITY } }, "logit_bias.5: "],
      [{ logit_bias: { cat: 1 } }, "logit_bias.cat: "],
      [{ logit_bias: [1] }, "logit_bias: "],
      [{ top_logprobs: 2 }, "top_logprobs: needs logprobs: true"],
      [{ logprobs: true, top_logprobs: 21 }, "top_logprobs: "],
      [{ response_format: { type: "json_schema" } }, "response_format.type: only"],
      [{ tools: [{ type: "function" }] }, "tools: tools are not supported"],
      [{ tool_choice: "required" }, "tool_choice: tools are not supported"],
      [{ modalities: ["audio"] }, "modalities.0: only text"],
      [{ audio: { voice: "alloy", format: "mp3" } }, "audio: audio is not supported"],
      [{ web_search_options: {} }, "web_search_options: web search is not supported"],
      [{ function_call: { name: "f" } }, "function_call: functions are not supported"],
      [{ stream: "yes" }, "stream: "],
      [{ stream_options: { include_usage: true } }, "stream_options: needs stream: true"],
      [{ stream: false, stream_options: {} }, "stream_options: needs stream: true"],
      [{ kvasir: { cache_ttl: 60 } }, 'kvasir: Unrecognized key: "cache_ttl"'],
      [{ kvasir: { parent_message_id: "m" } }, "kvasir.parent_message_id: needs conversation"],
      [{ seed: 0.5 }, "seed: "],
    ];
    for (const [fields, start] of cases) expect(refusal(fields)).toStartWith(start);
  });
});

describe("withoutHistory", () => {
  const system: ChatMessage = { role: "system", content: "be brief" };
  const hi: ChatMessage = { role: "user", content: "hi" };
  const hello: ChatMessage = { role: "assistant", content: "hello" };
  const history = [system, hi, hello];

  test("takes a client's new messages as they are", () => {
    expect(withoutHistory([], [system, hi])).toEqual([system, hi]);
    expect(withoutHistory(history, [hi])).toEqual([hi]);
  });

  test("drops the history that a client sends again, whole or its system message alone", () => {
    expect(withoutHistory(history, [...history, hi])).toEqual([hi]);
    expect(withoutHistory(history, [system, hi])).toEqual([hi]);
    expect(withoutHistory([hi], [hi])).toEqual([]);
  });

  test("keeps a history that differs from the stored one", () => {
    const other: ChatMessage = { role: "system", content: "be long" };
    expect(withoutHistory(history, [other, hi])).toEqual([other, hi]);
  });
});
