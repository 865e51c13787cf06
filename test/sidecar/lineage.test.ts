// Texts keep the ids they came with, and whatever does not line up costs hits and never meaning.

import { afterEach, describe, expect, test } from "bun:test";
import { Database } from "bun:sqlite";
import { mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Lineage, type LineageOptions } from "../../sidecar/lineage.ts";
import { END, FAKE_SPECIALS, fakeTokenizer, modelIds, START } from "../support/fake-tokenizer.ts";
import { SeededRandom, testSeed } from "../support/seeded-random.ts";

const SALT = new Uint8Array(32);
const OTHER_SALT = new Uint8Array(32).fill(1);
const tokenizer = fakeTokenizer();
const cleanups: (() => void)[] = [];

afterEach(() => {
  for (const cleanup of cleanups.splice(0).toReversed()) cleanup();
});

function open(changes: Partial<LineageOptions> = {}): Lineage {
  const lineage = new Lineage({
    path: ":memory:",
    tokenizerId: "bytes",
    specialTokens: FAKE_SPECIALS,
    maxSegments: 1000,
    maxSegmentTokens: 1000,
    ...changes,
  });
  cleanups.push(() => lineage.close());
  return lineage;
}

function temporaryFile(): string {
  const directory = mkdtempSync(join(tmpdir(), "kvasir-lineage-"));
  cleanups.push(() => rmSync(directory, { recursive: true }));
  return join(directory, "lineage.sqlite");
}

/** Resolves and says which text had to be encoded. */
async function resolve(lineage: Lineage, text: string, salt = SALT) {
  const encoded: string[] = [];
  const { tokens, knownTokens } = await lineage.resolve(salt, text, async (part) => {
    encoded.push(part);
    return tokenizer.encode(part);
  });
  return { tokens: Array.from(tokens), knownTokens, encoded };
}

const paired = (text: string) => modelIds(text, () => true);
/** "<start>user hi<end><start>bot hello<end>" with the answer in ids of the model's own. */
const TURN = "<start>user hi<end><start>bot hello<end>";
const TURN_IDS = [START, ...modelIds("user hi", () => false), END, START, ...paired("bot hello"), END];

describe("Lineage", () => {
  test("an unknown text is encoded whole", async () => {
    const { tokens, knownTokens, encoded } = await resolve(open(), TURN);
    expect(tokens).toEqual(Array.from(tokenizer.encode(TURN)));
    expect(knownTokens).toBe(0);
    expect(encoded).toEqual([TURN]);
  });

  test("a text seen before keeps the ids that the model generated", async () => {
    const lineage = open();
    lineage.remember(SALT, TURN, Int32Array.from(TURN_IDS));
    const { tokens, knownTokens, encoded } = await resolve(lineage, TURN);
    expect(tokens).toEqual(TURN_IDS);
    expect(knownTokens).toBe(TURN_IDS.length);
    expect(encoded).toEqual([]);
  });

  test("the next turn reuses the ids so far and encodes only what is new, from its special token on", async () => {
    const lineage = open();
    lineage.remember(SALT, TURN, Int32Array.from(TURN_IDS));
    const { tokens, knownTokens, encoded } = await resolve(lineage, `${TURN}<start>user more<end>`);
    expect(encoded).toEqual(["<start>user more<end>"]);
    expect(knownTokens).toBe(TURN_IDS.length);
    expect(tokens).toEqual([...TURN_IDS, START, ...modelIds("user more", () => false), END]);
  });

  test("an edited earlier message takes its ids and all later ones with it", async () => {
    const lineage = open();
    lineage.remember(SALT, TURN, Int32Array.from(TURN_IDS));
    const edited = TURN.replace("hi", "ho");
    const { tokens, encoded } = await resolve(lineage, edited);
    expect(encoded).toEqual([edited]);
    expect(tokens).toEqual(Array.from(tokenizer.encode(edited)));
  });

  test("accounts do not see each other's ids, nor do tokenizers", async () => {
    const path = temporaryFile();
    open({ path }).remember(SALT, TURN, Int32Array.from(TURN_IDS));
    expect((await resolve(open({ path }), TURN)).knownTokens).toBe(TURN_IDS.length);
    expect((await resolve(open({ path }), TURN, OTHER_SALT)).knownTokens).toBe(0);
    expect((await resolve(open({ path, tokenizerId: "another" }), TURN)).knownTokens).toBe(0);
  });

  test("survives reopening its file, which only its owner can read", async () => {
    const path = temporaryFile();
    const first = open({ path });
    first.remember(SALT, TURN, Int32Array.from(TURN_IDS));
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(statSync(`${path}-wal`).mode & 0o777).toBe(0o600);
    first.close();
    const { tokens } = await resolve(open({ path }), TURN);
    expect(tokens).toEqual(TURN_IDS);
  });

  test("keeps nothing from where text and tokens do not line up", async () => {
    const lineage = open();
    // The end token of the first message is missing from the ids.
    const wrong = TURN_IDS.filter((_, i) => i !== TURN_IDS.indexOf(END));
    lineage.remember(SALT, TURN, Int32Array.from(wrong));
    const { tokens } = await resolve(lineage, TURN);
    const lengths = TURN_IDS.filter((id) => id !== START && id !== END).length;
    expect(tokens.length).toBeGreaterThanOrEqual(lengths);
    expect(tokens.filter((id) => id === END).length).toBe(2);
    const empty = open();
    empty.remember(SALT, TURN, Int32Array.of(START, END));
    expect((await resolve(empty, TURN)).knownTokens).toBe(0);
  });

  test("text without special tokens is one segment", async () => {
    const lineage = open({ specialTokens: new Map() });
    lineage.remember(SALT, "plain", Int32Array.from(paired("plain")));
    expect((await resolve(lineage, "plain")).tokens).toEqual(paired("plain"));
    expect((await resolve(lineage, "plain text")).encoded).toEqual(["plain text"]);
  });

  test("of special tokens that begin alike the longest is meant", async () => {
    const specialTokens = new Map([["<s>", 3], ["<s>s", 4]]);
    const lineage = open({ specialTokens });
    lineage.remember(SALT, "<s>s", Int32Array.of(4));
    expect((await resolve(lineage, "<s>s")).tokens).toEqual([4]);
  });

  test("forgets the least recently used segments, and never grows past its limit", async () => {
    const path = temporaryFile();
    const lineage = open({ path, maxSegments: 10 });
    const texts = Array.from({ length: 30 }, (_, i) => `<start>text ${i}`);
    lineage.remember(SALT, texts[0]!, tokenizer.encode(texts[0]!));
    for (const text of texts.slice(1)) {
      await resolve(lineage, texts[0]!);
      lineage.remember(SALT, text, tokenizer.encode(text));
    }
    const reader = new Database(path);
    const { count } = reader.query<{ count: number }, []>("SELECT count(*) AS count FROM text_segments").get()!;
    reader.close();
    expect(count).toBeLessThanOrEqual(10);
    expect((await resolve(lineage, texts[0]!)).knownTokens).toBeGreaterThan(0);
    expect((await resolve(lineage, texts[1]!)).knownTokens).toBe(0);
    expect((await resolve(lineage, texts[29]!)).knownTokens).toBeGreaterThan(0);
  });

  test("a lookup searches an index of keys, not a tree that holds the ids of other segments", () => {
    const path = temporaryFile();
    open({ path });
    const reader = new Database(path);
    const tables = reader.query<{ name: string; wr: number }, []>("PRAGMA table_list").all();
    expect(tables.find(({ name }) => name === "text_segments")).toMatchObject({ wr: 0 });
    const plan = "EXPLAIN QUERY PLAN SELECT ids FROM text_segments WHERE key = x'00'";
    const steps = reader.query<{ detail: string }, []>(plan).all();
    reader.close();
    expect(steps.map(({ detail }) => detail)).toEqual([
      expect.stringMatching(/^SEARCH text_segments USING INDEX \S+ \(key=\?\)$/),
    ]);
  });

  test("the table of earlier versions goes, and the file gives its room back", async () => {
    const path = temporaryFile();
    const earlier = new Database(path);
    earlier.run("CREATE TABLE segments (key BLOB PRIMARY KEY, ids BLOB, used_at INTEGER) WITHOUT ROWID");
    earlier.run("INSERT INTO segments VALUES (x'00', zeroblob(4000000), 1)");
    earlier.close();
    const lineage = open({ path });
    lineage.remember(SALT, TURN, Int32Array.from(TURN_IDS));
    expect((await resolve(lineage, TURN)).tokens).toEqual(TURN_IDS);
    lineage.close();
    expect(statSync(path).size).toBeLessThan(1_000_000);
    const reader = new Database(path);
    const tables = reader.query<{ name: string }, []>("SELECT name FROM sqlite_schema WHERE type = 'table'").all();
    reader.close();
    expect(tables).toEqual([{ name: "text_segments" }]);
  });

  test("keeps what comes before a segment that is too long, and nothing from there on", async () => {
    const lineage = open({ maxSegmentTokens: 20 });
    const before = "<start>user hi<end>";
    const text = `${before}<start>${"x".repeat(21)}<end><start>after<end>`;
    expect(lineage.remember(SALT, text, tokenizer.encode(text))).toHaveLength(1);
    const { encoded, knownTokens } = await resolve(lineage, text);
    expect(knownTokens).toBe(tokenizer.encode(before).length);
    expect(encoded).toEqual([text.slice(before.length)]);
  });

  test("a store that fails costs hits, is counted, and answers all the same", async () => {
    const path = temporaryFile();
    const lineage = open({ path });
    lineage.remember(SALT, TURN, Int32Array.from(TURN_IDS));
    const saboteur = new Database(path);
    saboteur.run("DROP TABLE text_segments");
    saboteur.close();
    lineage.remember(SALT, "<start>new", tokenizer.encode("<start>new"));
    const { tokens } = await resolve(lineage, TURN);
    expect(tokens).toEqual(Array.from(tokenizer.encode(TURN)));
    expect(lineage.failureCount).toBe(2);
  });

  const seed = testSeed();
  test(`ids always stand for the text asked for (seed ${seed})`, async () => {
    const random = new SeededRandom(seed);
    const lineage = open({ maxSegments: 60 });
    const word = () => ["a", "bé", "🙂", "", "abc"][random.integer(0, 4)]!;
    let text = "";
    for (let i = 0; i < 400; i++) {
      if (random.next() < 0.2 || text.length > 200) text = "";
      text += `${random.next() < 0.7 ? "<start>" : ""}${word()}${word()}${random.next() < 0.7 ? "<end>" : ""}`;
      if (text === "") continue;
      const { tokens } = await resolve(lineage, text);
      const bytes = Buffer.concat(tokens.map((id) => tokenizer.tokenBytes(id)));
      expect(bytes.toString()).toBe(text);
      const ids = text
        .split(/(<start>|<end>)/)
        .flatMap((part) => FAKE_SPECIALS.get(part) ?? modelIds(part, () => random.next() < 0.5));
      lineage.remember(SALT, text, Int32Array.from(ids));
    }
  });
});
