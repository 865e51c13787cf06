// One answer from the claim of its conversation to the stored turn. Streaming and plain answers both
// run it; they differ only in what they do with the deltas.

import type { NewMessage } from "../db/queries.ts";
import type { Claim, RequestRow } from "../db/turns.ts";
import { isUuid, uuidv7 } from "../db/uuid.ts";
import type { ChatMessage, Done } from "../sidecar/protocol.ts";
import type { ChatRequest } from "./chat-request.ts";
import { chatMessages, conversationId, submitRequest } from "./chat-request.ts";
import type { ChoiceAnswer, Outcome } from "./chat-response.ts";
import type { ChoiceDelta } from "./completion-stream.ts";
import { CompletionAborted } from "./completion-stream.ts";
import { ApiError, invalidRequest, toApiError } from "./errors.ts";
import type { Services } from "./services.ts";
import { conversationNotFound } from "./turn-keeper.ts";

/** Yields deltas, returns how it ended. */
export type Run = AsyncGenerator<ChoiceDelta[], Outcome>;
export type RunStep = IteratorResult<ChoiceDelta[], Outcome>;

export class Generation {
  readonly id = uuidv7();
  readonly #startedAtMs = performance.now();
  #firstMs: number | null = null;
  readonly #choiceCount: number;
  readonly #services: Services;
  readonly #chat: ChatRequest;
  readonly #answers: ChoiceAnswer[];
  #sidecar: string | null = null;
  #claim: Claim | null = null;
  #newMessages: NewMessage[];
  readonly #onEnd: () => void;

  /** `onEnd` is called when `run` has ended, however it does. */
  constructor(services: Services, chat: ChatRequest, onEnd: () => void) {
    this.#onEnd = onEnd;
    this.#services = services;
    this.#chat = chat;
    this.#choiceCount = chat.n ?? 1;
    this.#answers = Array.from({ length: this.#choiceCount }, () => ({ text: "", logprobs: null }));
    this.#newMessages = chatMessages(chat);
  }

  /** What the choices have said; whole when `run` has ended. */
  get answers(): ChoiceAnswer[] {
    return this.#answers;
  }

  /**
   * Yields deltas as they come; returns when everything is stored. Whoever leaves early aborts the
   * signal and calls return(). Throws ApiError, or CompletionAborted after the abort.
   */
  async *run(signal: AbortSignal): Run {
    const { metrics, turns } = this.#services;
    let hasStarted = false;
    let error: unknown = new CompletionAborted("the client left");
    try {
      const request = await this.#prepare();
      hasStarted = true;
      const outcome = yield* this.#generate(request, signal);
      error = null;
      const totalMs = performance.now() - this.#startedAtMs;
      metrics.countAnswer(outcome.done, { model: this.#chat.model, firstMs: this.#firstMs, totalMs });
      return outcome;
    } catch (cause) {
      error = cause;
      throw cause;
    } finally {
      if (error !== null && (hasStarted || this.#claim !== null)) {
        const row = this.#failedRow(error);
        metrics.countFailure(this.#chat.model, row.error ?? "abort");
        await turns.end(row, this.#claim);
      }
      this.#onEnd();
    }
  }

  async *#generate(
    request: ReturnType<typeof submitRequest>,
    signal: AbortSignal,
  ): Run {
    const { sidecars, turns } = this.#services;
    const events = sidecars.generate(request, {
      key: placementKey(request.conversation, request.messages),
      preferred: this.#claim?.sidecar ?? null,
      signal,
      onPlaced: async (sidecar) => {
        this.#sidecar = sidecar;
        if (this.#claim !== null) await turns.place(this.#claim, sidecar);
      },
    });
    for await (const event of events) {
      if (event.type === "done") return await this.#finish(event.done, signal);
      this.#firstMs ??= performance.now() - this.#startedAtMs;
      this.#collect(event.deltas);
      yield event.deltas;
    }
    throw new Error("the sidecar's events ended without a done");
  }

  /** Checks the model, claims the conversation and puts its history before the new messages. */
  async #prepare(): Promise<ReturnType<typeof submitRequest>> {
    const { account, config, sidecars, turns } = this.#services;
    const { maxModelLen } = await sidecars.findModel(this.#chat.model);
    const request = submitRequest(this.#chat, {
      salt: account.salt,
      maxModelLen,
      deadlineMs: config.requestTimeoutMs,
    });
    const conversation = conversationId(this.#chat);
    if (conversation === null) return request;
    if (!isUuid(conversation)) throw conversationNotFound(conversation);
    const parentId = this.#chat.kvasir?.parent_message_id ?? undefined;
    if (parentId !== undefined && !isUuid(parentId)) {
      throw invalidRequest("kvasir.parent_message_id: must be a message id", "kvasir.parent_message_id");
    }
    this.#claim = await turns.claim({
      accountId: account.id,
      conversationId: conversation.toLowerCase(),
      requestId: this.id,
      parentId,
    });
    const history = this.#claim.history.map(toChatMessage);
    const added = withoutHistory(history, request.messages);
    if (added.length === 0 && history.at(-1)?.role === "assistant") {
      throw invalidRequest("messages: the conversation holds all of them, and their answer", "messages");
    }
    this.#newMessages = added;
    return {
      ...request,
      conversation: this.#claim.conversationId,
      messages: [...history, ...added],
    };
  }

  #collect(deltas: ChoiceDelta[]): void {
    const keepsText = this.#claim !== null || this.#chat.stream !== true;
    if (!keepsText) return;
    for (const { choice, text, logprobs } of deltas) {
      const answer = this.#answers[choice];
      if (answer === undefined) throw new Error(`the sidecar sent choice ${choice}`);
      answer.text += text;
      if (logprobs !== null) (answer.logprobs ??= []).push(...logprobs);
    }
  }

  /** Stores the turn, or the request alone, before anybody is told that the answer is whole. */
  async #finish(done: Done, signal: AbortSignal): Promise<Outcome> {
    const { turns } = this.#services;
    const sidecar = this.#sidecar!;
    if (done.finishReasons.includes("abort")) {
      throw new ApiError(503, "aborted", "The sidecar aborted the answer.", { retryAfterS: 1 });
    }
    if (signal.aborted) throw new CompletionAborted("the client left");
    const row = { ...this.#row(), ...doneFields(done) };
    const claim = this.#claim;
    if (claim === null) {
      await turns.end(row, null);
      return { done, sidecar, turn: null };
    }
    const { completionTokens } = done.usage;
    const tokenCount = this.#choiceCount === 1 ? completionTokens : null;
    const answers = this.#answers.map(({ text }) => ({ content: storable(text), tokenCount }));
    const stored = await turns.commit({ claim, request: row, newMessages: this.#newMessages, answers });
    return { done, sidecar, turn: { conversationId: claim.conversationId, ...stored } };
  }

  #row(): RequestRow {
    return {
      id: this.id,
      accountId: this.#services.account.id,
      conversationId: this.#claim?.conversationId ?? null,
      model: this.#chat.model,
      sidecar: this.#sidecar,
      isStream: this.#chat.stream === true,
      choiceCount: this.#choiceCount,
      cacheTtlS: this.#chat.kvasir?.cache_ttl_s ?? null,
      cachePriority: this.#chat.kvasir?.priority ?? null,
    };
  }

  #failedRow(error: unknown): RequestRow {
    if (error instanceof CompletionAborted) return { ...this.#row(), finishReason: "abort" };
    return { ...this.#row(), error: toApiError(error).code };
  }
}

/**
 * The messages that the conversation does not hold yet. Clients may send only new ones, or, as OpenAI
 * clients without a server-side conversation do, the whole history or its system message again.
 */
export function withoutHistory(history: ChatMessage[], messages: ChatMessage[]): ChatMessage[] {
  if (history.length === 0) return messages;
  const isRepeated = history.every((message, i) => isSame(message, messages[i]));
  if (isRepeated) return messages.slice(history.length);
  const [first] = messages;
  const isSystem = first?.role === "system" || first?.role === "developer";
  return isSystem && isSame(history[0]!, first) ? messages.slice(1) : messages;
}

function isSame(a: ChatMessage, b: ChatMessage | undefined): boolean {
  return b !== undefined && a.role === b.role && a.content === b.content && a.name === b.name;
}

function toChatMessage(row: { role: string; name: string | null; content: string }): ChatMessage {
  const role = row.role as ChatMessage["role"]; // only such roles are ever stored
  const { name, content } = row;
  return name === null ? { role, content } : { role, content, name };
}

/** What all turns of one chat have in common: its id, or its beginning up to the first user message. */
function placementKey(conversation: string | null, messages: ChatMessage[]): string {
  if (conversation !== null) return conversation;
  const end = messages.findIndex((message) => message.role === "user");
  return messages
    .slice(0, end + 1)
    .map(({ content }) => content)
    .join("\0");
}

/** Models may write NUL characters; Postgres has no place for them. */
function storable(text: string): string {
  return text.toWellFormed().replaceAll("\0", "\ufffd");
}

function doneFields({ usage, timings, finishReasons, missReasons, cache }: Done): Partial<RequestRow> {
  return {
    promptTokens: usage.promptTokens,
    completionTokens: usage.completionTokens,
    cachedGpuTokens: usage.cachedTokens.gpu,
    cachedHostTokens: usage.cachedTokens.host,
    cachedDiskTokens: usage.cachedTokens.disk,
    queueMs: timings.queueMs,
    loadMs: timings.loadMs,
    prefillMs: timings.prefillMs,
    ttftMs: timings.ttftMs,
    totalMs: timings.totalMs,
    finishReason: finishReasons[0] ?? null,
    missReasons,
    cacheChoice: cache.choice,
    predictedLoadMs: cache.predictedLoadMs,
    predictedRecomputeMs: cache.predictedRecomputeMs,
    loadedBytes: cache.loadedBytes,
    droppedTokens: cache.droppedTokens,
    viewRestarted: cache.isViewRestarted,
  };
}
