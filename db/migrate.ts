// Brings the database to this version's schema. Several processes may start at once on a fresh
// database, so all of it happens under one advisory lock, on one connection.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { sql } from "drizzle-orm";
import { drizzle } from "drizzle-orm/postgres-js";
import { migrate as applyMigrations } from "drizzle-orm/postgres-js/migrator";
import type { Orm } from "./client.ts";
import { connect, DatabaseUnavailable, errorCode, isConnectionFailure } from "./client.ts";
import { accounts } from "./schema.ts";
import { uuidv7 } from "./uuid.ts";

const MIGRATIONS_FOLDER = fileURLToPath(new URL("../migrations", import.meta.url));

/** Key of the advisory lock: "kvasir" in ASCII. */
const LOCK_KEY = 0x6b7661736972;

/** The account of every request, until there are keys. */
export const DEFAULT_ACCOUNT = "default";

/** The database was made by a newer Kvasir. */
export class SchemaTooNew extends Error {
  override name = "SchemaTooNew";
}

/**
 * Applies the migrations that are missing and makes the default account with its random salt.
 * Throws SchemaTooNew, or DatabaseUnavailable.
 */
export async function migrate(url: string, connectTimeoutMs = 5000): Promise<void> {
  const client = connect({ url, connectTimeoutMs }, 1);
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
    if (!isConnectionFailure(error)) throw error;
    throw new DatabaseUnavailable(
      `cannot reach the database at ${withoutPassword(url)} (${errorCode(error)}): ` +
        "start it, or set DATABASE_URL",
      { cause: error },
    );
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

/** The URL as it may be shown. */
function withoutPassword(url: string): string {
  return url.replace(/(\/\/[^:/@]*):[^@]*@/, "$1:***@");
}
