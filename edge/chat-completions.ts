// POST /v1/chat/completions: OpenAI's chat, as one JSON object or as a stream of server-sent events.

import type { Context } from "hono";
import type { ChatRequest } from "./chat-request.ts";
import { chatRequest } from "./chat-request.ts";
import type { AnswerHead, Outcome } from "./chat-response.ts";
import { ChunkWriter, completionBody } from "./chat-response.ts";
import { CompletionAborted } from "./completion-stream.ts";
import { ApiError, clientLeft, toApiError } from "./errors.ts";
import { EventStream } from "./event-stream.ts";
import { Generation, type Run } from "./generation.ts";
import { readJson } from "./json-body.ts";
import type { Services } from "./services.ts";

export async function postChatCompletion(c: Context, services: Services): Promise<Response> {
  const { config, drain } = services;
  if (drain.inFlight >= config.maxInFlight) {
    const message = `${config.maxInFlight} answers are in progress already.`;
    throw new ApiError(429, "too_many_requests", message, { retryAfterS: 1 });
  }
  const left = new AbortController();
  c.req.raw.signal.addEventListener("abort", () => left.abort(), { once: true });
  const leave = drain.enter(() => left.abort());
  let chat: ChatRequest;
  try {
    chat = await readJson(c.req.raw, chatRequest, config.bodyLimitBytes);
  } catch (error) {
    leave();
    throw error;
  }
  const generation = new Generation(services, chat, leave);
  const run = generation.run(left.signal);
  const head: AnswerHead = {
    id: `chatcmpl-${generation.id}`,
    created: Math.floor(Date.now() / 1000),
    model: chat.model,
  };
  if (chat.stream === true) return await streamAnswer(c, services, { chat, head, run, left });
  const outcome = await lastOf(run);
  return c.json(completionBody(head, generation.answers, outcome));
}

async function streamAnswer(
  c: Context,
  services: Services,
  { chat, head, run, left }: { chat: ChatRequest; head: AnswerHead; run: Run; left: AbortController },
): Promise<Response> {
  const { keepAliveMs } = services.config;
  // Refusals come before the first token: wait for it, so that they get their HTTP status. Who waits
  // long, in a queue, gets the headers and comments meanwhile.
  const first = run.next();
  await settledWithin(first, keepAliveMs);
  const includeUsage = chat.stream_options?.include_usage === true;
  const events = new EventStream({
    run,
    first,
    choiceCount: chat.n ?? 1,
    writer: new ChunkWriter(head, includeUsage),
    includeUsage,
    keepAliveMs,
    toError: (error) => failure(error, services),
    onLeave: () => left.abort(),
  });
  return c.body(events.open(), 200, {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no", // nginx would hold the tokens back
  });
}

/** Runs to the end; returns what the run returns. */
async function lastOf(run: Run): Promise<Outcome> {
  for (;;) {
    const step = await run.next();
    if (step.done === true) return step.value;
  }
}

/** Resolves when the promise is fulfilled or the time is over. Throws what it rejects with till then. */
async function settledWithin(promise: Promise<unknown>, timeoutMs: number): Promise<void> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const timeout = new Promise((resolve) => {
    timer = setTimeout(resolve, timeoutMs);
  });
  try {
    await Promise.race([promise, timeout]);
  } finally {
    clearTimeout(timer);
  }
  promise.catch(() => {}); // whoever pulls the stream gets the error
}

/** What the client is told when the stream breaks off. */
function failure(error: unknown, { drain, log }: Services): ApiError {
  if (error instanceof CompletionAborted) return abortError(drain.isCut);
  const known = toApiError(error);
  if (known.status === 500) log.error({ err: error }, "a stream failed");
  return known;
}

/** An answer ends early when its client leaves, or at a drain's limit: then the client reads this. */
export function abortError(isShuttingDown: boolean): ApiError {
  if (!isShuttingDown) return clientLeft();
  return new ApiError(503, "shutting_down", "The server is shutting down. Try again.", {
    retryAfterS: 1,
  });
}
