// What the README promises: its table is that of the options, its paths are there, its SQL runs, its requests parse.
// UPDATE_README=1 writes the table anew.

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import postgres from "postgres";
import { migrate } from "../db/migrate.ts";
import { chatRequest } from "../edge/chat-request.ts";
import { conversationRequest, conversationUpdate } from "../edge/conversations.ts";
import { optionsTable } from "./support/options-table.ts";
import { startPostgres } from "./support/postgres.ts";

setDefaultTimeout(60_000);

const ROOT = join(import.meta.dir, "..");
const PATH = join(ROOT, "README.md");
const TABLE = /(<!-- options -->\n)[^]*?(<!-- \/options -->)/;

if (process.env["UPDATE_README"] === "1") {
  const before = readFileSync(PATH, "utf8");
  writeFileSync(PATH, before.replace(TABLE, (_, begin, end) => `${begin}${optionsTable()}\n${end}`));
}
const readme = readFileSync(PATH, "utf8");

/** Contents of fenced blocks of a language. */
function blocks(language: string): string[] {
  return [...readme.matchAll(new RegExp(`^\`\`\`${language}\\n([^]*?)^\`\`\``, "gm"))].map((match) => match[1]!);
}

describe("the README", () => {
  test("has the table of all options", () => {
    expect(TABLE.exec(readme)?.[0]).toBe(`<!-- options -->\n${optionsTable()}\n<!-- /options -->`);
  });

  test("says where a part that runs alone has another default or variable", () => {
    const rowOf = (flag: string) => readme.split("\n").find((line) => line.startsWith(`| \`--${flag} `));
    expect(rowOf("port")).toContain("| `8787`; sidecar alone: `8786` |");
    expect(rowOf("port")).toContain("| `KVASIR_PORT`; sidecar alone: `KVASIR_SIDECAR_PORT` |");
    expect(rowOf("log-level")).toContain("| `warn`; edge alone: `info` |");
    expect(rowOf("sidecar")).toContain("| edge alone: `ws://127.0.0.1:8786` |");
    expect(rowOf("data")).toContain("| `~/.kvasir` |");
  });

  test("names only files that are there", () => {
    const links = [...readme.matchAll(/\]\(([^)#]+)[^)]*\)/g)].map((match) => match[1]!);
    const named = [...readme.matchAll(/`((?:edge|sidecar|db|launcher|config|test|migrations)\/[\w./-]*)`/g)];
    const paths = [...links.filter((link) => !link.includes("://")), ...named.map((match) => match[1]!)];
    expect(paths.length).toBeGreaterThan(20);
    expect(paths.filter((path) => !existsSync(join(ROOT, path)))).toEqual([]);
  });

  test("names only scripts that are there", () => {
    const { scripts } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as { scripts: object };
    const named = [...readme.matchAll(/\b(?:npm|bun) run (?:-s )?([\w:]+)(?![\w/.])/g)].map((match) => match[1]!);
    expect(named.filter((name) => !Object.hasOwn(scripts, name))).toEqual([]);
  });

  test("has requests that the edge takes", () => {
    const calls = blocks("sh").join("\n").matchAll(/(\/v1\/[\w/$-]+)[^{]*?-d (?:'([^']*)'|@- <<END.*\n([^]*?)^END)/gm);
    let count = 0;
    for (const [, path, quoted, document] of calls) {
      count++;
      const json = quoted ?? document!;
      const body: unknown = JSON.parse(json);
      const schema = path === "/v1/chat/completions"
        ? chatRequest
        : path === "/v1/conversations" ? conversationRequest : conversationUpdate;
      expect([path, json, schema.safeParse(body).error?.message]).toEqual([path, json, undefined]);
    }
    expect(count).toBe(5);
  });

  test("has SQL that runs", async () => {
    const pg = await startPostgres();
    const sql = postgres(pg.url, { max: 1, onnotice: () => {} });
    try {
      await migrate(pg.url);
      const statements = blocks("sql").flatMap((block) => block.split(/;\s*\n/)).filter((text) => text.trim() !== "");
      expect(statements.length).toBeGreaterThan(3);
      for (const statement of statements) await sql.unsafe(statement);
    } finally {
      await sql.end();
      await pg.remove();
    }
  });
});
