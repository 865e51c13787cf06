// The migrator applies a migration only when its `when` is later than the last one applied, and else
// skips it in silence: the journal must be in order.

import { describe, expect, test } from "bun:test";
import { cpSync, mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import journal from "../../migrations/meta/_journal.json";

describe("the migration journal", () => {
  test("has strictly increasing times", () => {
    const times = journal.entries.map((entry) => entry.when);
    for (let i = 1; i < times.length; i++) expect(times[i]).toBeGreaterThan(times[i - 1]!);
    expect(times.length).toBeGreaterThan(0);
  });

  test("numbers its entries from 0 without a gap", () => {
    expect(journal.entries.map((entry) => entry.idx)).toEqual([...journal.entries.keys()]);
  });

  test("lists exactly the SQL files that are there", () => {
    const folder = new URL("../../migrations/", import.meta.url).pathname;
    const files = readdirSync(folder).filter((name) => name.endsWith(".sql"));
    expect(files.toSorted()).toEqual(journal.entries.map((entry) => `${entry.tag}.sql`).toSorted());
  });

  test("says all that schema.ts says", () => {
    const root = new URL("../../", import.meta.url).pathname;
    const out = mkdtempSync(join(tmpdir(), "kvasir-test-migrations-"));
    try {
      cpSync(join(root, "migrations"), out, { recursive: true });
      const kit = join(root, "node_modules/drizzle-kit/bin.cjs");
      const options = ["--dialect", "postgresql", "--schema", "db/schema.ts", "--out", relative(root, out)];
      const run = Bun.spawnSync([process.execPath, kit, "generate", ...options], { cwd: root });
      expect(run.stdout.toString() + run.stderr.toString()).toContain("No schema changes");
    } finally {
      rmSync(out, { recursive: true });
    }
  });
});
