// Brings the database to this version's schema. Several processes may start at once on a fresh
// database, so all of it happens under one advisory lock, on one connection.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { sql } from "drizzle-orm";
import { drizzle } from "drizzle-orm/postgres-js";
import { migrate as applyMigrations } from "drizzle-orm/postgres-js/migrator";
import type postgres from "postgres";
import type { Orm } from "./client.ts";
import { connect, DatabaseUnavailable, errorCode, isConnectionFailure } from "./client.ts";
import { accounts } from "./schema.ts";
import { uuidv7 } from "./uuid.ts";

const MIGRATIONS_FOLDER = fileURLToPath(new URL("../migrations", import.meta.url));

/** Key of the advisory lock: "kvasir" in ASCII. */
const LOCK_KEY = 0x6b7661736972;

/** The account of every request, until there are keys. */
export const DEFAULT_ACCOUNT = "default";

/** The database answers, but not as it should: wrong password, no such database, no rights. */
export class DatabaseRefused extends Error {
  override name = "DatabaseRefused";
}

/** The database was made by a newer Kvasir. */
export class SchemaTooNew extends Error {
  override name = "SchemaTooNew";
}

/**
 * Applies the migrations that are missing and makes the default account with its random salt.
 * Throws SchemaTooNew, DatabaseRefused, or DatabaseUnavailable.
 */
export async function migrate(url: string, connectTimeoutMs = 5000): Promise<void> {
  const client = open(url, connectTimeoutMs);
  const orm = drizzle(client);
  try {
    await orm.execute(sql`select pg_advisory_lock(${LOCK_KEY}::bigint)`);
    await refuseNewerSchema(orm);
    await applyMigrations(orm, { migrationsFolder: MIGRATIONS_FOLDER });
    const salt = crypto.getRandomValues(new Uint8Array(32));
    await orm
      .insert(accounts)
      .values({ id: uuidv7(), name: DEFAULT_ACCOUNT, salt })
      .onConflictDoNothing();
  } catch (error) {
    throw explain(error, withoutPassword(url));
  } finally {
    await client.end({ timeout: 1 }); // the lock goes with its connection
  }
}

/** `when` of the newest migration that this version knows, in ms since 1970. */
export function newestKnownMigration(): number {
  const journal = JSON.parse(readFileSync(`${MIGRATIONS_FOLDER}/meta/_journal.json`, "utf8")) as {
    entries: { when: number }[];
  };
  return Math.max(...journal.entries.map((entry) => entry.when));
}

async function refuseNewerSchema(orm: Orm): Promise<void> {
  const [table] = await orm.execute<{ name: string | null }>(
    sql`select to_regclass('drizzle.__drizzle_migrations')::text as name`,
  );
  if (table?.name === null) return;
  const [row] = await orm.execute<{ newest: string | null }>(
    sql`select max(created_at) as newest from drizzle.__drizzle_migrations`,
  );
  if (Number(row?.newest ?? 0) > newestKnownMigration()) {
    throw new SchemaTooNew(
      "the database has a newer schema than this version of Kvasir knows: " +
        "update Kvasir, or point DATABASE_URL at another database",
    );
  }
}

function open(url: string, connectTimeoutMs: number): postgres.Sql {
  try {
    return connect({ url, connectTimeoutMs }, 1);
  } catch (error) {
    throw new DatabaseRefused(`${withoutPassword(url)} is not the URL of a database`, { cause: error });
  }
}

/** For the person who set the URL. */
function explain(error: unknown, url: string): unknown {
  if (isConnectionFailure(error)) {
    const message = `cannot reach the database at ${url} (${errorCode(error)}): start it, or set DATABASE_URL`;
    return new DatabaseUnavailable(message, { cause: error });
  }
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    if (cause.name !== "PostgresError") continue;
    return new DatabaseRefused(`the database at ${url} cannot be used: ${cause.message}`, { cause: error });
  }
  return error;
}

/** The URL as it may be shown. */
function withoutPassword(url: string): string {
  return url.replace(/(\/\/[^:/@]*):[^@]*@/, "$1:***@");
}
