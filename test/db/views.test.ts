// The views for psql and the sidecars' samples, with numbers that can be checked by hand; and a database of an
// earlier version, which keeps its rows.

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { sql } from "drizzle-orm";
import { drizzle } from "drizzle-orm/postgres-js";
import { migrate as applyMigrations } from "drizzle-orm/postgres-js/migrator";
import postgres from "postgres";
import { Database } from "../../db/client.ts";
import { migrate } from "../../db/migrate.ts";
import { findAccount } from "../../db/queries.ts";
import { requests } from "../../db/schema.ts";
import { recordSidecarStats, STATS_DAYS_MAX } from "../../db/sidecar-stats.ts";
import type { RequestRow } from "../../db/turns.ts";
import { uuidv7 } from "../../db/uuid.ts";
import { startPostgres, type TestPostgres } from "../support/postgres.ts";

setDefaultTimeout(60_000);

const MIGRATIONS = new URL("../../migrations", import.meta.url).pathname;
/** The first versions had these. */
const EARLY_MIGRATIONS = 2;

let pg: TestPostgres;
let db: Database;
let accountId: string;

beforeAll(async () => {
  pg = await startPostgres();
  await makeEarlyDatabase(pg.url);
  await migrate(pg.url);
  db = new Database({
    url: pg.url, poolSize: 2, connectTimeoutMs: 2000, queryTimeoutMs: 5000, statementTimeoutMs: 5000,
    probeIntervalMs: 20,
  });
  accountId = (await db.run((orm) => findAccount(orm, "default")))!.id;
});

afterAll(async () => {
  await db?.close();
  await pg?.remove();
});

/** A database as an early version left it, with one request. */
async function makeEarlyDatabase(url: string): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "kvasir-test-early-"));
  const client = postgres(url, { max: 1, onnotice: () => {} });
  try {
    cpSync(MIGRATIONS, folder, { recursive: true });
    const path = join(folder, "meta/_journal.json");
    const journal = JSON.parse(readFileSync(path, "utf8")) as { entries: unknown[] };
    writeFileSync(path, JSON.stringify({ ...journal, entries: journal.entries.slice(0, EARLY_MIGRATIONS) }));
    await applyMigrations(drizzle(client), { migrationsFolder: folder });
    const id = uuidv7();
    await client`insert into accounts (id, name, salt) values (${id}, 'old', ${Buffer.alloc(32)})`;
    await client`insert into requests (id, account_id, model, is_stream, choice_count)
      values (${uuidv7()}, ${id}, 'old', false, 1)`;
  } finally {
    await client.end();
    rmSync(folder, { recursive: true });
  }
}

async function insert(model: string, rows: Partial<RequestRow>[]): Promise<void> {
  const common = { accountId, model, sidecar: "a", isStream: false, choiceCount: 1, finishReason: "stop" };
  await db.run((orm) => orm.insert(requests).values(rows.map((row) => ({ id: uuidv7(), ...common, ...row }))));
}

async function rowsOf(view: string, model: string): Promise<Record<string, unknown>[]> {
  return await db.run((orm) =>
    orm.execute(sql`select * from ${sql.identifier(view)} where model = ${model} order by 1, 2, 3`),
  );
}

describe("a database of an early version", () => {
  test("gets the new columns and keeps its rows", async () => {
    const rows = await db.run((orm) =>
      orm.execute(sql`select model, cache_choice, dropped_tokens from requests where model = 'old'`),
    );
    expect([...rows]).toEqual([{ model: "old", cache_choice: null, dropped_tokens: null }]);
  });
});

describe("cache_choices", () => {
  const load = { cacheChoice: "load", predictedLoadMs: 10, predictedRecomputeMs: 50, loadedBytes: 1000 };

  beforeAll(async () => {
    await insert("choices", [
      { ...load, loadMs: 12 },
      { ...load, loadMs: 70 }, // 20 ms worse than computing anew
      { ...load, cacheChoice: "recompute", predictedLoadMs: 80, loadMs: 0, loadedBytes: 0 },
      { cacheChoice: "none", loadMs: 0, loadedBytes: 0 },
    ]);
  });

  test("says per request what was expected, what it took, and the regret", async () => {
    const rows = await rowsOf("cache_choices", "choices");
    const seen = rows.map((row) => [row["choice"], row["load_error_ms"], row["regret_ms"]]);
    expect(seen.toSorted()).toEqual([["load", 2, 0], ["load", 60, 20], ["recompute", null, null]]);
  });

  test("sums up per day and choice", async () => {
    const [loads, recomputes] = await rowsOf("cache_choices_by_day", "choices");
    expect(loads).toMatchObject({
      choice: "load", requests: "2", loaded_bytes: "2000", predicted_load_ms_median: 10, load_ms_median: 41,
      predicted_recompute_ms_median: 50, regretted: "1", regret_ms_sum: 20,
    });
    expect(loads!["load_error_ms_p90"]).toBeCloseTo(54.2);
    expect(recomputes).toMatchObject({ choice: "recompute", requests: "1", regretted: "0", regret_ms_sum: null });
  });
});

describe("shares of what was served from cache", () => {
  const cached = { cachedGpuTokens: 40, cachedHostTokens: 10, cachedDiskTokens: 0 };
  const none = { cachedGpuTokens: 0, cachedHostTokens: 0, cachedDiskTokens: 0 };

  beforeAll(async () => {
    await insert("shares", [
      // Of 1,000 tokens 900 had left the view before.
      { ...cached, promptTokens: 1000, droppedTokens: 900, missReasons: { absent: 30, evicted: 20 } },
      // Computed whole, and then left the view.
      { ...none, promptTokens: 100, droppedTokens: 64, missReasons: { absent: 100 } },
      { error: "queue_full", finishReason: null },
    ]);
    await insert("nothing", [{ error: "queue_full", finishReason: null }]);
  });

  test("are of the tokens that were needed, by day", async () => {
    const [day] = await rowsOf("cache_hits_by_day", "shares");
    expect(day).toMatchObject({
      requests: "3", prompt_tokens: "1100", missed_tokens: "150", gpu_share: 0.2, host_share: 0.05, disk_share: 0,
    });
    expect((await rowsOf("cache_hits_by_day", "nothing"))[0]).toMatchObject({ gpu_share: null, missed_tokens: "0" });
  });
});

describe("latency_by_day", () => {
  test("has the percentiles of a day", async () => {
    const answered = Array.from({ length: 100 }, (_, i) => ({
      ttftMs: i + 1, queueMs: 2 * (i + 1), totalMs: i + 1 + 1000, completionTokens: 11,
    }));
    await insert("latency", [...answered, { error: "queue_full", finishReason: null }]);
    const [day] = await rowsOf("latency_by_day", "latency");
    expect(day).toMatchObject({
      requests: "101", failed: "1", ttft_ms_p50: 50.5, ttft_ms_p99: 99.01, queue_ms_p50: 101, tokens_per_second_p50: 10,
    });
    expect(day!["ttft_ms_p90"]).toBeCloseTo(90.1);
  });
});

describe("sidecar_stats", () => {
  test("keeps one sample a minute, and shows the newest of each sidecar", async () => {
    const sample = (sidecar: string, steps: number) =>
      db.run((orm) => recordSidecarStats(orm, sidecar, { steps }));
    const old = sql`insert into sidecar_stats (sidecar, taken_at, stats) values
      ('a', now() - interval '1 hour', '{"steps": 1}'),
      ('a', now() - make_interval(days => ${STATS_DAYS_MAX}, mins => 2), '{"steps": 0}')`;
    await db.run((orm) => orm.execute(old));
    await Promise.all([sample("a", 7), sample("b", 9)]);
    const steps = sql`select sidecar, (stats->>'steps')::int as steps from sidecar_stats_latest order by 1`;
    expect([...(await db.run((orm) => orm.execute(steps)))]).toEqual([
      { sidecar: "a", steps: 7 },
      { sidecar: "b", steps: 9 },
    ]);
    await Promise.all([sample("a", 8), sample("a", 9)]); // the same minute, unless one has just ended
    const counts = sql`select count(*)::int as samples, count(distinct taken_at)::int as minutes,
      min((stats->>'steps')::int) as oldest from sidecar_stats where sidecar = 'a'`;
    const [row] = await db.run((orm) => orm.execute<{ samples: number; minutes: number }>(counts));
    expect(row).toMatchObject({ samples: row!.minutes, oldest: 1 });
  });
});
