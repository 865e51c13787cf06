// Delete is durable: a deleted conversation stays in the table of pending deletes of every sidecar
// that ever served it, until that sidecar has acknowledged. They are sent after a sidecar's hello,
// before any submit; at once after a delete; and now and then, for what another edge or an absent
// database left behind.

import type { Database } from "../db/client.ts";
import { listPendingDeletes, removePendingDelete } from "../db/queries.ts";
import { LIMITS } from "./config.ts";
import type { Log } from "./log.ts";
import type { SidecarClient } from "./sidecar-client.ts";

/** A hello waits so long for the database; then the sidecar is used, and the sweep sends the rest. */
const HELLO_WAIT_MS = 2000;
const SWEEP_INTERVAL_MS = 60_000;

export class PendingDeletes {
  readonly #database: Database;
  readonly #log: Log;
  readonly #clients: () => readonly SidecarClient[];
  readonly #sweep: ReturnType<typeof setInterval>;

  constructor(database: Database, log: Log, clients: () => readonly SidecarClient[]) {
    this.#database = database;
    this.#log = log;
    this.#clients = clients;
    this.#sweep = setInterval(() => this.sendSoon(), SWEEP_INTERVAL_MS);
  }

  /** Sends what waits for this sidecar; resolves when it is sent, not when it is acknowledged. */
  async send(client: SidecarClient): Promise<void> {
    try {
      const rows = await this.#database.run(
        (orm) => listPendingDeletes(orm, client.name, LIMITS.deleteBatch),
        HELLO_WAIT_MS,
      );
      for (const { salt, conversationId } of rows) void this.#forget(client, salt, conversationId);
    } catch (error) {
      this.#warn(client.name, error);
    }
  }

  /** Sends to the named sidecars, or to all that are connected, in the background. */
  sendSoon(names?: readonly string[]): void {
    for (const client of this.#clients()) {
      if (client.isReady && (names?.includes(client.name) ?? true)) void this.send(client);
    }
  }

  close(): void {
    clearInterval(this.#sweep);
  }

  async #forget(client: SidecarClient, salt: Uint8Array, conversationId: string): Promise<void> {
    try {
      await client.forget(salt, conversationId);
      await this.#database.run((orm) => removePendingDelete(orm, client.name, conversationId));
    } catch (error) {
      this.#warn(client.name, error); // the row stays: it is sent again
    }
  }

  #warn(sidecar: string, error: unknown): void {
    this.#log.warn({ sidecar, reason: (error as Error).message }, "deletes are still pending");
  }
}
