// The data directory: made for its owner alone, held by one launcher at a time. The lock is SQLite's lock on an
// empty database: the kernel gives it back when its process ends, however it ends.

import { Database } from "bun:sqlite";
import { mkdirSync, readFileSync, statfsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { StartError } from "./start-error.ts";

/** For a new PostgreSQL cluster and its write-ahead log. */
const FREE_BYTES_MIN = 512 * 2 ** 20;

export interface DataDirectoryLock {
  release(): void;
}

/** Throws StartError when it cannot be used, or is in use. */
export function lockDataDirectory(path: string, freeBytesMin: number = FREE_BYTES_MIN): DataDirectoryLock {
  const pidFile = join(path, "launcher.pid");
  let lock: Database;
  try {
    mkdirSync(path, { recursive: true, mode: 0o700 });
    lock = new Database(join(path, "launcher.lock"), { create: true, readwrite: true });
  } catch (error) {
    throw cannotUse(path, error);
  }
  try {
    lock.run("PRAGMA locking_mode = EXCLUSIVE");
    lock.run("BEGIN EXCLUSIVE");
  } catch (error) {
    lock.close();
    if ((error as { code?: string }).code !== "SQLITE_BUSY") throw cannotUse(path, error);
    throw new StartError(
      `the data directory ${path} is in use by another Kvasir (process ${readFileSync(pidFile, "utf8").trim()}): ` +
        "stop that one, or give this one another with --data",
    );
  }
  writeFileSync(pidFile, `${process.pid}\n`, { mode: 0o600 });
  const { bavail, bsize } = statfsSync(path);
  if (bavail * bsize < freeBytesMin) {
    lock.close();
    const [free, wanted] = [bavail * bsize, freeBytesMin].map((bytes) => Math.floor(bytes / 2 ** 20));
    throw new StartError(
      `the disk of ${path} has ${free} MiB left, ${wanted} MiB are needed: free some, or choose another with --data`,
    );
  }
  return { release: () => lock.close() };
}

function cannotUse(path: string, error: unknown): StartError {
  return new StartError(
    `cannot use the data directory ${path} (${(error as Error).message}): choose another with --data`,
  );
}
