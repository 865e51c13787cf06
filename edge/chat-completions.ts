// POST /v1/chat/completions: OpenAI's chat, as one JSON object or as a stream of server-sent events.

import type { Context } from "hono";
import type { ChatRequest } from "./chat-request.ts";
import { chatRequest } from "./chat-request.ts";
import type { AnswerHead, Outcome } from "./chat-response.ts";
import { ChunkWriter, completionBody, errorEvent, KEEP_ALIVE, STREAM_END } from "./chat-response.ts";
import type { ChoiceDelta } from "./completion-stream.ts";
import { CompletionAborted } from "./completion-stream.ts";
import { ApiError, toApiError } from "./errors.ts";
import { Generation } from "./generation.ts";
import { readJson } from "./json-body.ts";
import type { Services } from "./services.ts";

type Run = AsyncGenerator<ChoiceDelta[], Outcome>;
type Step = IteratorResult<ChoiceDelta[], Outcome>;

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
  const writer = new ChunkWriter(head, includeUsage);
  const events = new EventStream(run, first, chat.n ?? 1, writer, includeUsage);
  const body = events.open(keepAliveMs, (error) => failure(error, services), () => left.abort());
  return c.body(body, 200, {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no", // nginx would hold the tokens back
  });
}

/** Turns the steps of a run into server-sent events. */
class EventStream {
  readonly #encoder = new TextEncoder();
  #next: Promise<Step> | null;
  #hasRoles = false;

  constructor(
    readonly run: Run,
    first: Promise<Step>,
    readonly choiceCount: number,
    readonly writer: ChunkWriter,
    readonly includeUsage: boolean,
  ) {
    this.#next = first;
  }

  open(
    keepAliveMs: number,
    toError: (error: unknown) => ApiError,
    onLeave: () => void,
  ): ReadableStream<Uint8Array> {
    let timer: ReturnType<typeof setInterval> | undefined;
    let isIdle = true;
    return new ReadableStream<Uint8Array>({
      start: (controller) => {
        timer = setInterval(() => {
          const hasRoom = (controller.desiredSize ?? 0) > 0;
          if (isIdle && hasRoom) controller.enqueue(this.#encoder.encode(KEEP_ALIVE));
          isIdle = true;
        }, keepAliveMs);
      },
      pull: async (controller) => {
        let text = "";
        let isLast = false;
        try {
          while (text === "") {
            const step = await (this.#next ?? this.run.next());
            this.#next = null;
            isLast = step.done === true;
            text = this.#render(step);
          }
        } catch (error) {
          if (error instanceof CompletionAborted && timer === undefined) return; // cancelled
          isLast = true;
          text = errorEvent(toError(error).body());
        }
        isIdle = false;
        controller.enqueue(this.#encoder.encode(text));
        if (!isLast) return;
        clearInterval(timer);
        controller.close();
      },
      cancel: async () => {
        clearInterval(timer);
        timer = undefined;
        onLeave();
        await this.run.return(undefined as never); // ends a run that waits to be asked for more
      },
    });
  }

  #render(step: Step): string {
    const { writer } = this;
    const choices = [...Array(this.choiceCount).keys()];
    let text = "";
    if (!this.#hasRoles) text += choices.map((choice) => writer.role(choice)).join("");
    this.#hasRoles = true;
    if (step.done !== true) return text + step.value.map((delta) => writer.content(delta)).join("");
    const outcome = step.value;
    text += choices.map((choice) => writer.finish(choice, outcome)).join("");
    if (this.includeUsage) text += writer.usage(outcome);
    return text + STREAM_END;
  }
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

/** Nobody reads this after a client has left; after a drain's limit, the client does. */
export function abortError(isShuttingDown: boolean): ApiError {
  if (!isShuttingDown) return new ApiError(503, "aborted", "The request was aborted.");
  return new ApiError(503, "shutting_down", "The server is shutting down. Try again.", {
    retryAfterS: 1,
  });
}
