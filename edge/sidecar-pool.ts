// Which sidecar answers. A conversation goes where its cache is: to the sidecar of its last turn, or,
// where none is known, by rendezvous hashing of what its requests have in common, with bounded loads.
// An answer of which nothing has arrived yet moves to another sidecar, or waits for a reconnect.

import type { ModelInfo, SubmitRequest } from "../sidecar/protocol.ts";
import type { CompletionEvent } from "./completion-stream.ts";
import { CompletionAborted } from "./completion-stream.ts";
import { LIMITS } from "./config.ts";
import { ApiError } from "./errors.ts";
import type { SidecarClient } from "./sidecar-client.ts";

export type Placement = {
  /** Requests with the same key like the same sidecar. */
  key: string;
  /** Name of the sidecar that holds the conversation's cache. */
  preferred: string | null;
  /** Awaited before the sidecar sees the request; on each try. */
  onPlaced: (sidecar: string) => Promise<void>;
  signal: AbortSignal;
};

/** A sidecar may carry this many times the mean load before its keys go to their second choice. */
const LOAD_BOUND = 1.25;

/** Errors that say nothing about the request: another sidecar, or the same one later, may take it. */
const RETRYABLE = new Set(["sidecar_lost", "shutting_down", "queue_full"]);

export class SidecarPool {
  readonly #waiters = new Set<() => void>();

  constructor(
    readonly clients: readonly SidecarClient[],
    readonly waitMs: number = LIMITS.sidecarWaitMs,
  ) {}

  /** To be called by each client's onChange. */
  wake(): void {
    for (const waiter of this.#waiters) waiter();
  }

  get isReady(): boolean {
    return this.clients.some((client) => client.isReady);
  }

  /** Models by id, those of sidecars that are away included: they may come back. */
  get models(): ReadonlyMap<string, ModelInfo> {
    return new Map(
      this.clients.flatMap(({ model }) => (model === null ? [] : [[model.id, model] as const])),
    );
  }

  byName(name: string): SidecarClient | undefined {
    return this.clients.find((client) => client.name === name && client.isReady);
  }

  /** Throws ApiError 404, or 503 when no sidecar has said yet what it serves. */
  async findModel(id: string): Promise<ModelInfo> {
    const deadlineMs = Date.now() + this.waitMs;
    for (;;) {
      const model = this.models.get(id);
      if (model !== undefined) return model;
      const isUnknown = this.clients.some((client) => client.model === null);
      if (!isUnknown || this.isReady) {
        const known = [...this.models.keys()].join(", ");
        const message = `The model "${id}" does not exist here; there is: ${known}.`;
        throw new ApiError(404, "model_not_found", message, { param: "model" });
      }
      await this.#change(deadlineMs);
    }
  }

  /** Yields the answer's deltas and its end. Throws ApiError, or CompletionAborted after the signal. */
  async *generate(request: SubmitRequest, placement: Placement): AsyncGenerator<CompletionEvent> {
    const deadlineMs = Date.now() + request.deadlineMs;
    const refused = new Set<SidecarClient>();
    for (let tries = 1; ; tries++) {
      const client = await this.#acquire(request.model, placement, refused, deadlineMs);
      await placement.onPlaced(client.name);
      let hasOutput = false;
      try {
        for await (const event of this.#answer(client, request, placement.signal, deadlineMs)) {
          hasOutput = true;
          yield event;
        }
        return;
      } catch (error) {
        const canRetry = error instanceof ApiError && RETRYABLE.has(error.code);
        if (!canRetry || hasOutput || tries === LIMITS.placementTries) throw error;
        // A full queue is an answer, unless there is somebody else to ask.
        refused.add(client);
        if (error.code === "queue_full" && !this.#hasOther(request.model, refused)) throw error;
      }
    }
  }

  async *#answer(
    client: SidecarClient,
    request: SubmitRequest,
    signal: AbortSignal,
    deadlineAtMs: number,
  ): AsyncGenerator<CompletionEvent> {
    if (signal.aborted) throw new CompletionAborted("the answer was aborted");
    const deadlineMs = deadlineAtMs - Date.now();
    if (deadlineMs < 1) throw deadlineExceeded();
    const stream = client.submit({ ...request, deadlineMs });
    const abort = () => stream.abort();
    signal.addEventListener("abort", abort, { once: true });
    // The sidecar keeps the deadline; this is for one that hangs.
    const timer = setTimeout(() => stream.abort(), deadlineMs + 1000);
    try {
      for (;;) {
        const event = await stream.next();
        yield event;
        if (event.type === "done") return;
      }
    } catch (error) {
      if (error instanceof CompletionAborted && !signal.aborted) throw deadlineExceeded();
      throw error;
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", abort);
      stream.abort();
    }
  }

  /** A ready sidecar for the request; waits a while for one to come. */
  async #acquire(
    model: string,
    { key, preferred, signal }: Placement,
    refused: ReadonlySet<SidecarClient>,
    deadlineAtMs: number,
  ): Promise<SidecarClient> {
    const waitEndMs = Math.min(deadlineAtMs, Date.now() + this.waitMs);
    for (;;) {
      if (signal.aborted) throw new CompletionAborted("the answer was aborted");
      const ready = this.clients.filter((client) => client.isReady && client.model?.id === model);
      const fresh = ready.filter((client) => !refused.has(client));
      const candidates = fresh.length > 0 ? fresh : ready;
      const home = candidates.find((client) => client.name === preferred);
      if (home !== undefined) return home;
      if (candidates.length > 0) return chooseByKey(candidates, key);
      await this.#change(waitEndMs);
    }
  }

  #hasOther(model: string, refused: ReadonlySet<SidecarClient>): boolean {
    return this.clients.some(
      (client) => client.isReady && client.model?.id === model && !refused.has(client),
    );
  }

  /** Resolves when a sidecar comes or goes. Throws ApiError 503 at `deadlineMs`. */
  async #change(deadlineMs: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<boolean>();
    const waiter = () => resolve(true);
    this.#waiters.add(waiter);
    const timer = setTimeout(() => resolve(false), deadlineMs - Date.now());
    const hasChanged = await promise;
    clearTimeout(timer);
    this.#waiters.delete(waiter);
    if (hasChanged) return;
    const urls = this.clients.map((client) => client.url).join(", ");
    const message = `No sidecar is connected that could answer (${urls}). Try again.`;
    throw new ApiError(503, "no_sidecar", message, { retryAfterS: 1 });
  }

  close(): void {
    for (const client of this.clients) client.close();
  }
}

/** Rendezvous hashing (highest random weight): a sidecar that leaves moves only its own keys. */
export function chooseByKey<T extends { name: string; inFlight: number }>(
  candidates: readonly T[],
  key: string,
): T {
  const load = candidates.reduce((sum, { inFlight }) => sum + inFlight, 0);
  const bound = Math.ceil(((load + 1) / candidates.length) * LOAD_BOUND);
  const ranked = candidates
    .map((candidate) => ({ candidate, weight: fnv1a(`${candidate.name}\0${key}`) }))
    .sort((a, b) => b.weight - a.weight);
  const choice = ranked.find(({ candidate }) => candidate.inFlight < bound);
  return (choice ?? ranked[0]!).candidate;
}

/** FNV-1a, 32 bits, with a last mix because short names differ in few bits. */
function fnv1a(text: string): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) {
    hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  }
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

function deadlineExceeded(): ApiError {
  return new ApiError(504, "deadline_exceeded", "The answer took longer than the request's limit.");
}
