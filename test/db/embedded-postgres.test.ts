// The PostgreSQL that `npm start` brings: made, stopped, started, adopted after a kill, in a place of its own.

import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import postgres from "postgres";
import { type EmbeddedPostgres, PostgresError, startEmbeddedPostgres } from "../../db/embedded-postgres.ts";

setDefaultTimeout(60_000);

const parent = mkdtempSync(join(tmpdir(), "kvasir-test-embedded-"));
/** All tests that need a whole cluster share one: making it takes longest. */
const CLUSTER = "a name with spaces";
const running = new Set<EmbeddedPostgres>();

afterAll(async () => {
  for (const server of running) await server.stop();
  rmSync(parent, { recursive: true });
});

async function start(name: string, options: { rootMode?: "namespace" | "nobody" } = {}): Promise<EmbeddedPostgres> {
  const nobodyHomes = join(tmpdir(), `kvasir-test-nobody-${process.pid}`);
  const server = await startEmbeddedPostgres({
    directory: join(parent, name), onProgress: () => {}, ...(options.rootMode && { ...options, nobodyHomes }),
  });
  running.add(server);
  return server;
}

async function stop(server: EmbeddedPostgres): Promise<void> {
  await server.stop();
  running.delete(server);
}

async function query(url: string, text: string): Promise<unknown[]> {
  const sql = postgres(url, { max: 1, onnotice: () => {} });
  try {
    return [...(await sql.unsafe(text))];
  } finally {
    await sql.end();
  }
}

describe("an embedded PostgreSQL", () => {
  test("keeps data, password and port over a stop, and lets nobody in without the password", async () => {
    const first = await start(CLUSTER);
    await query(first.url, "create table kept as select 7 as n");
    expect(readFileSync(first.urlFile, "utf8").trim()).toBe(first.url);
    expect(statSync(first.urlFile).mode & 0o077).toBe(0);
    const stranger = new URL(first.url);
    stranger.password = "guess";
    await expect(query(stranger.href, "select 1")).rejects.toThrow("password authentication failed");
    await stop(first);
    await first.exited;
    const second = await start(CLUSTER);
    expect(second.url).toBe(first.url);
    expect(second.isAdopted).toBe(false);
    expect(await query(second.url, "select n from kept")).toEqual([{ n: 7 }]);
    await stop(second);
  });

  test("that was left running is adopted, and stopped by whom it was adopted", async () => {
    const left = await start(CLUSTER);
    const adopted = await start(CLUSTER);
    expect(adopted).toMatchObject({ isAdopted: true, pid: left.pid, url: left.url });
    await stop(adopted);
    await left.exited;
    running.delete(left);
  });

  test("that was killed starts again and recovers", async () => {
    const killed = await start(CLUSTER);
    await query(killed.url, "create table if not exists kept_too as select 8 as n");
    process.kill(killed.pid, "SIGKILL");
    await killed.exited;
    running.delete(killed);
    const again = await start(CLUSTER);
    expect(await query(again.url, "select n from kept_too")).toEqual([{ n: 8 }]);
    await stop(again);
  });

  test("says what is wrong with a cluster of another version, or without its password", async () => {
    const cluster = join(parent, "old", "cluster");
    mkdirSync(cluster, { recursive: true });
    await expect(start("old")).rejects.toThrow("is missing: without it nobody gets into");
    writeFileSync(join(parent, "old", "password"), "p\n");
    writeFileSync(join(cluster, "PG_VERSION"), "12\n");
    await expect(start("old")).rejects.toThrow(/was made by PostgreSQL 12, this is \d+/);
    await expect(start("old")).rejects.toBeInstanceOf(PostgresError);
  });

  test.if(process.getuid?.() === 0)("runs as nobody where root may not unshare", async () => {
    const server = await start("as-nobody", { rootMode: "nobody" });
    expect(statSync(`/proc/${server.pid}`).uid).toBe(65534);
    expect(await query(server.url, "select 1 as n")).toEqual([{ n: 1 }]);
    expect(existsSync(join(parent, "as-nobody", "cluster"))).toBe(false);
    await stop(server);
    rmSync(join(tmpdir(), `kvasir-test-nobody-${process.pid}`), { recursive: true });
  });
});
