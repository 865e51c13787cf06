// The database's side of a generation: claims, leases that are renewed while answers run, the commit
// that must come before the end of an answer, and rows of requests that left no turn.

import type { Database } from "../db/client.ts";
import { DatabaseUnavailable } from "../db/client.ts";
import { renewPendingDeletes } from "../db/queries.ts";
import type { Claim, RequestRow, StoredTurn, Turn } from "../db/turns.ts";
import {
  claimTurn,
  commitTurn,
  endRequest,
  recordPlacement,
  releaseClaims,
  renewLeases,
  TurnConflict,
} from "../db/turns.ts";
import { ApiError, databaseUnavailable } from "./errors.ts";
import type { Log } from "./log.ts";

export type TurnKeeperOptions = {
  database: Database;
  log: Log;
  leaseMs: number;
  commitTimeoutMs: number;
  /** A conversation was deleted while it was being answered: these sidecars must forget it again. */
  onDeleted: (sidecars: string[]) => void;
};

export class TurnKeeper {
  readonly #options: TurnKeeperOptions;
  /** Requests whose claims are held. */
  readonly #running = new Set<string>();
  /** Requests that ended while the database was away, so that their claims are still held. */
  readonly #unreleased = new Set<string>();
  #renewal: ReturnType<typeof setInterval> | undefined;
  /** Request rows that were lost because the database was away. */
  droppedRowCount = 0;

  constructor(options: TurnKeeperOptions) {
    this.#options = options;
  }

  /** Takes the conversation for one turn. Throws ApiError 404, 409 or 503. */
  async claim(options: {
    accountId: string;
    conversationId: string;
    requestId: string;
    parentId: string | undefined;
  }): Promise<Claim> {
    const { database, leaseMs } = this.#options;
    const result = await orUnavailable(
      database.run((orm) => claimTurn(orm, { ...options, leaseMs })),
    );
    switch (result) {
      case "not_found":
        throw conversationNotFound(options.conversationId);
      case "parent_not_found": {
        const message = `The conversation has no message ${options.parentId}.`;
        throw new ApiError(404, "message_not_found", message, { param: "kvasir.parent_message_id" });
      }
      case "busy": {
        const message = "Another turn of this conversation is being answered. Try again when it has ended.";
        throw new ApiError(409, "conversation_busy", message, { param: "conversation" });
      }
      default:
        this.#keep(options.requestId);
        return result;
    }
  }

  /** Before the sidecar sees the conversation. Throws ApiError 503. */
  async place(claim: Claim, sidecar: string): Promise<void> {
    if (claim.sidecar === sidecar) return;
    await orUnavailable(this.#options.database.run((orm) => recordPlacement(orm, claim, sidecar)));
    claim.sidecar = sidecar;
  }

  /** Stores the turn, trying again while the database is away. Throws ApiError `turn_not_stored`. */
  async commit(turn: Turn): Promise<StoredTurn> {
    const { database, commitTimeoutMs } = this.#options;
    const deadlineMs = Date.now() + commitTimeoutMs;
    for (;;) {
      const leftMs = Math.max(1, deadlineMs - Date.now());
      try {
        await database.whenUp(leftMs);
        const stored = await database.run((orm) => commitTurn(orm, turn), leftMs);
        this.#drop(turn.claim.requestId);
        return stored;
      } catch (error) {
        const canRetry = error instanceof DatabaseUnavailable && Date.now() < deadlineMs;
        if (!canRetry) throw notStored(error, commitTimeoutMs);
      }
    }
  }

  /**
   * Stores the row of a request that left no turn and gives its claim back. While the database is
   * away the row is lost, and counted, and the claim is given back later.
   */
  async end(request: RequestRow, claim: Claim | null): Promise<void> {
    const { database, log, onDeleted } = this.#options;
    if (claim !== null) this.#drop(claim.requestId);
    try {
      const hasClaim = await database.run((orm) => endRequest(orm, request, claim));
      if (hasClaim || claim === null) return;
      onDeleted(await database.run((orm) => renewPendingDeletes(orm, claim.conversationId)));
    } catch (error) {
      this.droppedRowCount++;
      if (claim !== null) this.#unreleased.add(claim.requestId);
      const droppedRowCount = this.droppedRowCount;
      const reason = (error as Error).message;
      log.warn({ request: request.id, reason, droppedRowCount }, "a request's row was dropped");
    }
  }

  /** The database is back: gives back what could not be given back before. */
  async releaseClaims(): Promise<void> {
    const requestIds = [...this.#unreleased];
    if (requestIds.length === 0) return;
    try {
      await this.#options.database.run((orm) => releaseClaims(orm, requestIds));
      for (const requestId of requestIds) this.#unreleased.delete(requestId);
    } catch (error) {
      // Their leases end by themselves; the next return of the database tries again.
      this.#options.log.warn({ reason: (error as Error).message }, "claims were not released");
    }
  }

  close(): void {
    clearInterval(this.#renewal);
  }

  #keep(requestId: string): void {
    this.#running.add(requestId);
    this.#renewal ??= setInterval(() => void this.#renew(), this.#options.leaseMs / 3);
  }

  #drop(requestId: string): void {
    this.#running.delete(requestId);
    if (this.#running.size > 0) return;
    clearInterval(this.#renewal);
    this.#renewal = undefined;
  }

  async #renew(): Promise<void> {
    const { database, leaseMs, log } = this.#options;
    try {
      await database.run((orm) => renewLeases(orm, [...this.#running], leaseMs));
    } catch (error) {
      // The commit notices when somebody else has taken a lapsed claim.
      log.warn({ reason: (error as Error).message }, "leases were not renewed");
    }
  }
}

export function conversationNotFound(id: string): ApiError {
  const message = `There is no conversation "${id}".`;
  return new ApiError(404, "conversation_not_found", message, { param: "conversation" });
}

/** Turns DatabaseUnavailable into its answer. */
export async function orUnavailable<T>(work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    throw error instanceof DatabaseUnavailable ? databaseUnavailable(error) : error;
  }
}

function notStored(cause: unknown, timeoutMs: number): ApiError {
  if (cause instanceof TurnConflict) {
    return new ApiError(409, "turn_not_stored", `The turn was not stored: ${cause.message}.`, { cause });
  }
  const message =
    cause instanceof DatabaseUnavailable
      ? `The database did not confirm the turn within ${timeoutMs} ms. ` +
        "Read the conversation before trying again."
      : "The turn was not stored: the database refused it.";
  return new ApiError(503, "turn_not_stored", message, { retryAfterS: 1, cause });
}
