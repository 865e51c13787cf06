// Who holds what: the KV blocks and the lineage segments of each conversation, so that a delete finds all of them and
// takes only what no other conversation holds. Blocks and segments are named under their account's salt, so that no two
// accounts ever hold the same one. Conversations are kept as hashes.

import type { Database } from "bun:sqlite";
import { openPrivateDatabase } from "./private-database.ts";

export interface HoldingsOptions {
  /** File of the store, or ":memory:". */
  readonly path: string;
  /** Most blocks and segments of all conversations together; some 60 bytes each. */
  readonly maxItems: number;
}

/** What a conversation has come to hold. Block ids are 16 characters of latin1, segment keys 32 bytes. */
export interface Holding {
  /** Each from its first block to its last, nothing left out: who holds a block holds all before it. */
  readonly chains: readonly (readonly string[])[];
  readonly segments: readonly Uint8Array[];
}

/** What one conversation holds and no other does, as of `usedAt`. */
export interface HeldAlone {
  readonly blocks: readonly string[];
  readonly segments: readonly Uint8Array[];
  /** Rises with each record; -1: it holds nothing. */
  readonly usedAt: number;
}

const Kind = { block: 0, segment: 1 } as const;

export class Holdings {
  readonly #database: Database;
  readonly #addConversation;
  readonly #findConversation;
  readonly #hold;
  readonly #exclusive;
  #itemCount: number;
  #clock: number;

  constructor(readonly options: HoldingsOptions) {
    this.#database = openPrivateDatabase(options.path, "NORMAL");
    this.#createTables();
    this.#addConversation = this.#database.query<{ id: number }, [Uint8Array, number]>(
      `INSERT INTO conversations (key, used_at) VALUES (?, ?)
        ON CONFLICT (key) DO UPDATE SET used_at = excluded.used_at RETURNING id`,
    );
    this.#findConversation = this.#database.query<{ id: number; used_at: number }, [Uint8Array]>(
      "SELECT id, used_at FROM conversations WHERE key = ?",
    );
    this.#hold = this.#database.query<unknown, [number, Uint8Array, number]>(
      "INSERT OR IGNORE INTO held (kind, item, conversation) VALUES (?, ?, ?)",
    );
    this.#exclusive = this.#database.query<{ kind: number; item: Uint8Array }, [number]>(
      `SELECT kind, item FROM held AS mine WHERE conversation = ? AND NOT EXISTS (
        SELECT 1 FROM held WHERE kind = mine.kind AND item = mine.item AND conversation <> mine.conversation)`,
    );
    const { count } = this.#database.query<{ count: number }, []>("SELECT count(*) AS count FROM held").get()!;
    this.#itemCount = count;
    const newest = "SELECT max(used_at) AS clock FROM conversations";
    this.#clock = this.#database.query<{ clock: number | null }, []>(newest).get()!.clock ?? 0;
  }

  /** More is held than the limit: conversations should be forgotten, the least recently used first. */
  get isFull(): boolean {
    return this.#itemCount > this.options.maxItems;
  }

  /** The conversation holds these from now on, too. */
  record(conversation: Uint8Array, { chains, segments }: Holding): void {
    this.#database.transaction(() => {
      const { id } = this.#addConversation.get(conversation, ++this.#clock)!;
      let added = 0;
      for (const chain of chains) added += this.#holdChain(chain, id);
      for (const segment of segments) added += this.#hold.run(Kind.segment, segment, id).changes;
      this.#itemCount += added;
    })();
  }

  /** From the last block back to the first that is held already: a long conversation costs only what is new. */
  #holdChain(chain: readonly string[], conversation: number): number {
    let added = 0;
    for (let i = chain.length - 1; i >= 0; i--) {
      if (this.#hold.run(Kind.block, Buffer.from(chain[i]!, "latin1"), conversation).changes === 0) break;
      added++;
    }
    return added;
  }

  heldAlone(conversation: Uint8Array): HeldAlone {
    const row = this.#findConversation.get(conversation);
    const items = row === null ? [] : this.#exclusive.all(row.id);
    const of = (kind: number) => items.filter((each) => each.kind === kind).map(({ item }) => item);
    return {
      blocks: of(Kind.block).map((item) => Buffer.from(item).toString("latin1")),
      segments: of(Kind.segment),
      usedAt: row?.used_at ?? -1,
    };
  }

  /** It holds nothing any more: what it held alone at `usedAt` has gone. False when it holds more since then. */
  remove(conversation: Uint8Array, usedAt: number): boolean {
    return this.#database.transaction(() => {
      const row = this.#findConversation.get(conversation);
      if (row === null) return true;
      if (row.used_at !== usedAt) return false;
      this.#itemCount -= this.#database.query("DELETE FROM held WHERE conversation = ?").run(row.id).changes;
      this.#database.query("DELETE FROM conversations WHERE id = ?").run(row.id);
      return true;
    })();
  }

  /** Null when there is none. */
  leastRecentlyUsed(): Uint8Array | null {
    const oldest = this.#database.query<{ key: Uint8Array }, []>(
      "SELECT key FROM conversations ORDER BY used_at LIMIT 1",
    );
    return oldest.get()?.key ?? null;
  }

  close(): void {
    this.#database.close();
  }

  #createTables(): void {
    this.#database.run(
      `CREATE TABLE IF NOT EXISTS conversations
        (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, used_at INTEGER NOT NULL)`,
    );
    this.#database.run("CREATE INDEX IF NOT EXISTS conversations_by_use ON conversations (used_at)");
    this.#database.run(
      `CREATE TABLE IF NOT EXISTS held (kind INTEGER, item BLOB, conversation INTEGER,
        PRIMARY KEY (kind, item, conversation)) WITHOUT ROWID`,
    );
    this.#database.run("CREATE INDEX IF NOT EXISTS held_by_conversation ON held (conversation)");
  }
}

/** Names a conversation of an account in the store. */
export function conversationKey(salt: Uint8Array, conversation: string): Uint8Array {
  return new Bun.CryptoHasher("sha256").update("kvasir conversation 1").update(salt).update(conversation).digest();
}
