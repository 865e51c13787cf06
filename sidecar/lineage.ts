// Which token ids a conversation's text really has. What a model generated need not be what the tokenizer makes of the
// same text, so the ids are kept, cut at special tokens: the text between two special tokens is a segment,
// and a segment's ids are found again under a hash chained over the whole text before it. Matching text reuses
// its ids, so the KV of the whole turn is found to the token; text that differs is encoded anew and costs only hits.

import { type Database, SQLiteError } from "bun:sqlite";
import { openPrivateDatabase } from "./private-database.ts";

/** Encodes text that begins at a special token (or at the start of the prompt). */
export type Encode = (text: string) => Promise<Int32Array>;

export interface LineageOptions {
  /** File of the store, or ":memory:". */
  readonly path: string;
  /** Names the tokenizer: ids of one mean nothing to another, and the file may outlive a change of model. */
  readonly tokenizerId: string;
  /** Content -> id of the tokens at which text is cut. */
  readonly specialTokens: ReadonlyMap<string, number>;
  /** Most segments kept; the least recently used go first. */
  readonly maxSegments: number;
  /** Longest segment kept, in tokens: of a longer one the context window sees too little to be worth the room. */
  readonly maxSegmentTokens: number;
}

export interface ResolvedPrompt {
  readonly tokens: Int32Array;
  /** Tokens taken from lineage instead of being encoded. */
  readonly knownTokens: number;
}

interface KnownBeginning {
  /** Ids of one piece each, in order. */
  readonly known: readonly Int32Array[];
  readonly encodeFrom: number | null;
}

const NOTHING_KNOWN: KnownBeginning = { known: [], encodeFrom: 0 };

/** A special token, or the text between two of them. */
interface Piece {
  readonly text: string;
  readonly specialId: number | null;
  /** Offset of the piece in the text. */
  readonly at: number;
}

export class Lineage {
  readonly #database: Database;
  readonly #find;
  readonly #exists;
  readonly #touch;
  readonly #insert;
  readonly #splitter: RegExp | null;
  #segmentCount: number;
  #clock: number;
  #failureCount = 0;

  constructor(readonly options: LineageOptions) {
    this.#database = openPrivateDatabase(options.path, "OFF");
    this.#createTable();
    this.#find = this.#database.query<{ ids: Uint8Array }, [Uint8Array]>(
      "SELECT ids FROM text_segments WHERE key = ?",
    );
    this.#exists = this.#database.query<unknown, [Uint8Array]>("SELECT 1 FROM text_segments WHERE key = ?");
    this.#touch = this.#database.query("UPDATE text_segments SET used_at = ? WHERE key = ?");
    this.#insert = this.#database.query(
      `INSERT INTO text_segments (key, ids, used_at) VALUES (?, ?, ?)
        ON CONFLICT (key) DO UPDATE SET ids = excluded.ids, used_at = excluded.used_at`,
    );
    const { count, clock } = this.#database
      .query<{ count: number; clock: number | null }, []>(
        "SELECT count(*) AS count, max(used_at) AS clock FROM text_segments",
      )
      .get()!;
    this.#segmentCount = count;
    this.#clock = clock ?? 0;
    this.#splitter = splitterOf(options.specialTokens);
  }

  /** Reads and writes that the store failed to do (a full disk, say): they cost hits, never an answer. */
  get failureCount(): number {
    return this.#failureCount;
  }

  /** The ids of `text`: known ones as far as the text was seen before under this salt, the rest encoded. */
  async resolve(salt: Uint8Array, text: string, encode: Encode): Promise<ResolvedPrompt> {
    const { known, encodeFrom } =
      this.#attempt(() => this.#database.transaction(() => this.#lookUp(salt, text))()) ?? NOTHING_KNOWN;
    const encoded = encodeFrom === null ? [] : [await encode(text.slice(encodeFrom))];
    return { tokens: joined([...known, ...encoded]), knownTokens: lengthOf(known) };
  }

  /**
   * Records that `tokens` are the ids of `text`. Nothing is kept from where the two do not line up, or from a segment
   * that is too long. Returns the keys of the segments that are kept.
   */
  remember(salt: Uint8Array, text: string, tokens: Int32Array): Uint8Array[] {
    const kept = this.#attempt(() => this.#database.transaction(() => this.#insertAll(salt, text, tokens))());
    this.#segmentCount += kept?.added ?? 0;
    if (this.#segmentCount > this.options.maxSegments) this.#attempt(() => this.#prune());
    return kept?.keys ?? [];
  }

  /** Removes segments, by the keys that remember() returned. Throws SQLiteError. */
  forget(keys: readonly Uint8Array[]): void {
    const remove = this.#database.query("DELETE FROM text_segments WHERE key = ?");
    this.#database.transaction(() => {
      for (const key of keys) this.#segmentCount -= remove.run(key).changes;
    })();
  }

  close(): void {
    this.#database.close();
  }

  /**
   * A table with row ids: its index holds keys alone, and a lookup never passes through the ids of other segments. In
   * a table without, rows lie in the tree that is searched, and a few long ones cost each lookup a read of them. Such
   * was the table "segments" of earlier files: it goes, with all it knew, which costs hits and no answer.
   */
  #createTable(): void {
    const earlier = this.#database.query("SELECT 1 FROM sqlite_schema WHERE name = 'segments'").get();
    if (earlier !== null) {
      this.#database.run("DROP TABLE segments");
      this.#attempt(() => this.#database.run("VACUUM")); // gives its room back, where there is room to do so
    }
    this.#database.run(
      `CREATE TABLE IF NOT EXISTS text_segments
        (key BLOB NOT NULL UNIQUE, ids BLOB NOT NULL, used_at INTEGER NOT NULL)`,
    );
    this.#database.run("CREATE INDEX IF NOT EXISTS text_segments_by_use ON text_segments (used_at)");
  }

  /** What the store knows of `text`, and from where on it must be encoded (null: not at all). */
  #lookUp(salt: Uint8Array, text: string): KnownBeginning {
    const known: Int32Array[] = [];
    let key = firstKey(salt, this.options.tokenizerId);
    let lastSpecial: { at: number; piecesBefore: number } | null = null;
    for (const piece of this.#split(text)) {
      key = nextKey(key, piece.text);
      if (piece.specialId !== null) {
        lastSpecial = { at: piece.at, piecesBefore: known.length };
        known.push(Int32Array.of(piece.specialId));
        continue;
      }
      const row = this.#find.get(key);
      if (row === null) {
        // From the special token on, so that the tokenizer sees that the piece is not the start of the text.
        known.length = lastSpecial?.piecesBefore ?? known.length;
        return { known, encodeFrom: lastSpecial?.at ?? piece.at };
      }
      this.#touch.run(++this.#clock, key);
      known.push(idsOf(row.ids));
    }
    return { known, encodeFrom: null };
  }

  /** Returns the keys of the segments, and how many of them are new. */
  #insertAll(salt: Uint8Array, text: string, tokens: Int32Array): { keys: Uint8Array[]; added: number } {
    const specialIds = new Set(this.options.specialTokens.values());
    let key = firstKey(salt, this.options.tokenizerId);
    const keys: Uint8Array[] = [];
    let at = 0;
    let added = 0;
    for (const piece of this.#split(text)) {
      key = nextKey(key, piece.text);
      if (piece.specialId !== null) {
        if (tokens[at] !== piece.specialId) break;
        at++;
        continue;
      }
      let end = at;
      while (end < tokens.length && !specialIds.has(tokens[end]!)) end++;
      if (end === at || end - at > this.options.maxSegmentTokens) break;
      if (this.#exists.get(key) === null) added++;
      this.#insert.run(key, bytesOf(tokens.subarray(at, end)), ++this.#clock);
      keys.push(key);
      at = end;
    }
    return { keys, added };
  }

  /** Null, and counted, when the store fails. */
  #attempt<Result>(work: () => Result): Result | null {
    try {
      return work();
    } catch (error) {
      if (!(error instanceof SQLiteError)) throw error;
      this.#failureCount++;
      return null;
    }
  }

  /** Drops the least recently used hundredth: few enough that no socket feels it. */
  #prune(): void {
    const excess = this.#segmentCount - Math.floor(this.options.maxSegments * 0.99);
    this.#database
      .query("DELETE FROM text_segments WHERE key IN (SELECT key FROM text_segments ORDER BY used_at LIMIT ?)")
      .run(excess);
    this.#segmentCount -= excess;
  }

  *#split(text: string): Generator<Piece> {
    let at = 0;
    for (const match of this.#splitter === null ? [] : text.matchAll(this.#splitter)) {
      if (match.index > at) yield { text: text.slice(at, match.index), specialId: null, at };
      const special = match[0];
      yield { text: special, specialId: this.options.specialTokens.get(special)!, at: match.index };
      at = match.index + special.length;
    }
    if (at < text.length) yield { text: text.slice(at), specialId: null, at };
  }
}

function splitterOf(specialTokens: ReadonlyMap<string, number>): RegExp | null {
  if (specialTokens.size === 0) return null;
  const longestFirst = [...specialTokens.keys()].sort((a, b) => b.length - a.length);
  return new RegExp(longestFirst.map((token) => RegExp.escape(token)).join("|"), "g");
}

function firstKey(salt: Uint8Array, tokenizerId: string): Uint8Array {
  const hasher = new Bun.CryptoHasher("sha256").update("kvasir lineage 2").update(salt);
  return hasher.update(tokenizerId).digest();
}

function nextKey(key: Uint8Array, text: string): Uint8Array {
  return new Bun.CryptoHasher("sha256").update(key).update(text).digest();
}

function lengthOf(parts: readonly Int32Array[]): number {
  return parts.reduce((sum, { length }) => sum + length, 0);
}

function joined(parts: readonly Int32Array[]): Int32Array {
  if (parts.length === 1) return parts[0]!;
  const ids = new Int32Array(lengthOf(parts));
  let at = 0;
  for (const part of parts) {
    ids.set(part, at);
    at += part.length;
  }
  return ids;
}

function bytesOf(ids: Int32Array): Uint8Array {
  return new Uint8Array(ids.buffer, ids.byteOffset, ids.byteLength);
}

function idsOf(bytes: Uint8Array): Int32Array {
  // Copied: sqlite's bytes need not be aligned to 4.
  return new Int32Array(bytes.slice().buffer);
}
