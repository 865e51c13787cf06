// A SQLite file for its owner alone: what the sidecar keeps about conversations lets their texts be read.

import { Database } from "bun:sqlite";
import { closeSync, openSync } from "node:fs";

/** `path`: a file, or ":memory:". `synchronous`: SQLite's word for what survives a loss of power. */
export function openPrivateDatabase(path: string, synchronous: "OFF" | "NORMAL"): Database {
  // Made before sqlite would, whose own files everybody could read.
  if (path !== ":memory:") closeSync(openSync(path, "a", 0o600));
  const database = new Database(path, { create: true, strict: true });
  database.run("PRAGMA journal_mode = WAL");
  database.run(`PRAGMA synchronous = ${synchronous}`);
  return database;
}
