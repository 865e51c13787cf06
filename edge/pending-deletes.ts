// Delete is durable: a deleted conversation stays in the table of pending deletes of every sidecar
// that ever served it, until that sidecar has acknowledged. They are sent after a sidecar's hello,
// before any submit; at once after a delete; and now and then, for what another edge or an absent
// database left behind.

import type { Database } from "../db/client.ts";
import { listPendingDeletes, removePendingDelete } from "../db/queries.ts";
import { LIMITS } from "./config.ts";
import type { Log } from "./log.ts";
import type { SidecarClient } from "./sidecar-client.ts";
import { soon } from "./soon.ts";

/** A hello waits so long for the database; then the sidecar is used, and the sweep sends the rest. */
const HELLO_WAIT_MS = 2000;
const SWEEP_INTERVAL_MS = 60_000;
/** A delete waits so long for the sidecars' counts before it answers without them. */
const REPLY_WAIT_MS = 2000;

export type Forgotten = {
  /** Blocks removed, by tier, over all sidecars that have replied. */
  blocks: Record<string, number>;
  /** Sidecars that are away or slow: they forget when they are back. */
  pendingSidecars: string[];
};

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

  /** Has the named sidecars forget a conversation, and waits a little for what they say. */
  async forgetNow(
    names: readonly string[],
    salt: Uint8Array,
    conversationId: string,
  ): Promise<Forgotten> {
    const replies = await Promise.all(
      names.map(async (name) => {
        const client = this.#clients().find((each) => each.isReady && each.name === name);
        if (client === undefined) return { name, blocks: null };
        return { name, blocks: await soon(this.#forget(client, salt, conversationId), REPLY_WAIT_MS) };
      }),
    );
    const blocks: Record<string, number> = {};
    for (const [tier, count] of replies.flatMap((reply) => Object.entries(reply.blocks ?? {}))) {
      blocks[tier] = (blocks[tier] ?? 0) + count;
    }
    const pending = replies.filter((reply) => reply.blocks === null);
    return { blocks, pendingSidecars: pending.map(({ name }) => name) };
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

  /** Blocks removed, by tier; null when it is still pending. */
  async #forget(
    client: SidecarClient,
    salt: Uint8Array,
    conversationId: string,
  ): Promise<Record<string, number> | null> {
    try {
      const blocks = await client.forget(salt, conversationId);
      await this.#database.run((orm) => removePendingDelete(orm, client.name, conversationId));
      return blocks;
    } catch (error) {
      this.#warn(client.name, error); // the row stays: it is sent again
      return null;
    }
  }

  #warn(sidecar: string, error: unknown): void {
    this.#log.warn({ sidecar, reason: (error as Error).message }, "deletes are still pending");
  }
}
