// The PostgreSQL that a start without DATABASE_URL runs: made on first use with a random password, started on a
// free port of 127.0.0.1, adopted when an earlier start was killed and left it running, and stopped in order.
// It is a process group of its own: a Ctrl-C in the terminal must not stop it before the edge is done.

import { type ChildProcess, type StdioOptions } from "node:child_process";
import { randomBytes } from "node:crypto";
import {
  chownSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import process from "node:process";
import postgres from "postgres";
import { type PostgresBinaries, PostgresError, type PrepareOptions, preparePostgres } from "./postgres-binaries.ts";

export { PostgresError } from "./postgres-binaries.ts";

export interface EmbeddedPostgresOptions extends PrepareOptions {
  /** Absolute path; made if needed. */
  readonly directory: string;
  readonly onProgress: (message: string) => void;
}

export interface EmbeddedPostgres {
  readonly url: string;
  /** Holds the URL, for `psql "$(cat FILE)"`. */
  readonly urlFile: string;
  readonly isAdopted: boolean;
  readonly pid: number;
  /** Resolves when the server has gone, for whatever reason. */
  readonly exited: Promise<void>;
  /** Ends all sessions, writes everything out; resolves when the server has gone. */
  stop(): Promise<void>;
}

const USER = "kvasir";
const POLL_MS = 25;
/** Also the recovery after a crash, which reads what was written since the last checkpoint. */
const READY_TIMEOUT_MS = 300_000;
const STOP_TIMEOUT_MS = 20_000;
const LOG_BYTES_MAX = 10_000_000;

/** Throws PostgresError. */
export async function startEmbeddedPostgres(options: EmbeddedPostgresOptions): Promise<EmbeddedPostgres> {
  mkdirSync(options.directory, { recursive: true, mode: 0o700 });
  const binaries = preparePostgres(options.directory, options);
  const cluster = join(realpathSync(binaries.home), "cluster");
  const urlFile = join(options.directory, "url");
  const password = loadPassword(binaries);
  if (!existsSync(cluster)) await createCluster(binaries, cluster, options);
  checkVersion(binaries, cluster);

  const running = await waitForRunning(cluster);
  const port = running?.port ?? (await choosePort(urlFile));
  const url = `postgres://${USER}:${password}@127.0.0.1:${port}/postgres`;
  const pid = running?.pid ?? (await launch(binaries, cluster, port));
  const exited = whenGone(pid);
  const stop = () => stopServer(pid, exited);
  try {
    await checkAnswers(url, cluster);
    writeFileSync(urlFile, `${url}\n`, { mode: 0o600 });
  } catch (error) {
    if (running === null) await stop();
    throw error;
  }
  return { url, urlFile, isAdopted: running !== null, pid, exited, stop };
}

/** 192 random bits; made before the cluster, which is initialised with it. */
function loadPassword({ home, owner }: PostgresBinaries): string {
  const path = join(home, "password");
  if (!existsSync(path)) {
    if (existsSync(join(home, "cluster"))) {
      throw new PostgresError(`${path} is missing: without it nobody gets into ${join(home, "cluster")}`);
    }
    writeFileSync(path, `${randomBytes(24).toString("base64url")}\n`, { mode: 0o600 });
    if (owner !== null) chownSync(path, owner, owner);
  }
  return readFileSync(path, "utf8").trim();
}

/** Under its final name a cluster is always complete. */
async function createCluster(
  binaries: PostgresBinaries,
  cluster: string,
  { onProgress }: EmbeddedPostgresOptions,
): Promise<void> {
  onProgress(`creating the database in ${cluster}`);
  const temporary = `${cluster}.new`;
  rmSync(temporary, { recursive: true, force: true });
  const flags = ["-U", USER, "-A", "scram-sha-256", `--pwfile=${join(binaries.home, "password")}`];
  const locale = ["-E", "UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"];
  const child = binaries.spawn("initdb", ["-D", temporary, ...flags, ...locale], {
    cwd: binaries.home,
    detached: true,
    stdio: ["ignore", "ignore", "pipe"],
  });
  let errors = "";
  child.stderr?.on("data", (chunk: Buffer) => (errors += chunk.toString()));
  const code = await new Promise<number | null>((resolve, reject) => {
    child.once("error", reject);
    child.once("close", resolve);
  });
  if (code !== 0) throw new PostgresError(`cannot create the database in ${cluster}: ${reasonIn(errors)}`);
  renameSync(temporary, cluster);
}

function checkVersion({ major }: PostgresBinaries, cluster: string): void {
  const version = readFileSync(join(cluster, "PG_VERSION"), "utf8").trim();
  if (version === String(major)) return;
  throw new PostgresError(
    `${cluster} was made by PostgreSQL ${version}, this is ${major}: run PostgreSQL ${version} on it ` +
      "and set DATABASE_URL, or give another --data directory",
  );
}

interface RunningServer {
  readonly pid: number;
  readonly port: number;
  readonly isReady: boolean;
}

/** A server on this cluster, once it accepts connections; null when there is none, or no longer. */
async function waitForRunning(cluster: string): Promise<RunningServer | null> {
  const deadline = Date.now() + STOP_TIMEOUT_MS;
  for (let server = readRunning(cluster); server !== null; server = readRunning(cluster)) {
    if (server.isReady) return server;
    if (Date.now() > deadline) {
      throw new PostgresError(`the PostgreSQL on ${cluster} (process ${server.pid}) does not get ready: stop it`);
    }
    await pause();
  }
  return null;
}

/** From the server's own pid file; one that a dead server left behind is removed. */
function readRunning(cluster: string): RunningServer | null {
  const path = join(cluster, "postmaster.pid");
  if (!existsSync(path)) return null;
  const lines = readFileSync(path, "utf8").split("\n");
  const pid = Number(lines[0]);
  if (isAlive(pid) && worksIn(pid, cluster)) {
    return { pid, port: Number(lines[3]), isReady: lines[7]?.trim() === "ready" };
  }
  rmSync(path, { force: true });
  return null;
}

/** Process ids are used again: a postmaster's working directory is its cluster. */
function worksIn(pid: number, cluster: string): boolean {
  if (process.platform !== "linux") return true;
  try {
    return readlinkSync(`/proc/${pid}/cwd`) === cluster;
  } catch (error) {
    if (["ENOENT", "EACCES"].includes((error as NodeJS.ErrnoException).code ?? "")) return false;
    throw error;
  }
}

/** Starts the server; returns its pid once it accepts connections. */
async function launch(binaries: PostgresBinaries, cluster: string, port: number): Promise<number> {
  const logPath = join(binaries.home, "log");
  const logStart = openLog(logPath);
  const settings = {
    listen_addresses: "127.0.0.1",
    port,
    unix_socket_directories: "", // a socket's path may be 107 bytes long: data directories can be deeper
    log_checkpoints: "off",
  };
  const flags = Object.entries(settings).flatMap(([name, value]) => ["-c", `${name}=${value}`]);
  const log = openSync(logPath, "a", 0o600);
  const stdio: StdioOptions = ["ignore", log, log];
  const child = binaries.spawn("postgres", ["-D", cluster, ...flags], {
    cwd: binaries.home,
    detached: true,
    stdio,
  });
  closeSync(log);
  if (!(await isReady(child, cluster))) {
    throw new PostgresError(
      `PostgreSQL did not start: ${reasonIn(readFileSync(logPath, "utf8").slice(logStart))} (log: ${logPath})`,
    );
  }
  child.unref();
  return child.pid!;
}

/** Returns where the next start's lines begin. */
function openLog(path: string): number {
  const size = statSync(path, { throwIfNoEntry: false })?.size ?? 0;
  if (size <= LOG_BYTES_MAX) return size;
  rmSync(path);
  return 0;
}

/** False when the server ended instead. */
async function isReady(child: ChildProcess, cluster: string): Promise<boolean> {
  const ended = new AbortController();
  child.once("error", () => ended.abort()); // it could not be run; the log is empty then
  child.once("exit", () => ended.abort());
  const deadline = Date.now() + READY_TIMEOUT_MS;
  while (!ended.signal.aborted) {
    const pidFile = join(cluster, "postmaster.pid");
    const lines = existsSync(pidFile) ? readFileSync(pidFile, "utf8").split("\n") : [];
    if (Number(lines[0]) === child.pid && lines[7]?.trim() === "ready") return true;
    if (Date.now() > deadline) child.kill("SIGINT");
    await pause();
  }
  return false;
}

/** The server must be ours: password and data directory. */
async function checkAnswers(url: string, cluster: string): Promise<void> {
  const sql = postgres(url, { max: 1, connect_timeout: 10, onnotice: () => {} });
  try {
    const [row] = await sql<{ directory: string }[]>`select current_setting('data_directory') as directory`;
    if (row?.directory !== cluster) throw new Error(`it works in ${row?.directory}`);
  } catch (error) {
    throw new PostgresError(
      `the PostgreSQL on ${cluster} cannot be used: ${(error as Error).message}`,
      { cause: error },
    );
  } finally {
    await sql.end({ timeout: 1 });
  }
}

/** The port of the last start when it is free, so that a psql URL stays good; else any free one. */
async function choosePort(urlFile: string): Promise<number> {
  const last = existsSync(urlFile) ? URL.parse(readFileSync(urlFile, "utf8").trim())?.port : undefined;
  return (await freePort(Number(last ?? 0))) ?? (await freePort(0))!;
}

function freePort(wanted: number): Promise<number | null> {
  return new Promise((resolve) => {
    const probe = createServer();
    probe.once("error", () => resolve(null)); // taken
    probe.listen(wanted, "127.0.0.1", () => {
      const { port } = probe.address() as { port: number };
      probe.close(() => resolve(port));
    });
  });
}

/** An adopted server is nobody's child here: its end can only be looked for. */
async function whenGone(pid: number): Promise<void> {
  while (isAlive(pid)) await pause();
}

async function stopServer(pid: number, exited: Promise<void>): Promise<void> {
  for (const signal of ["SIGINT", "SIGQUIT", "SIGKILL"] as const) {
    if (isAlive(pid)) process.kill(pid, signal); // fast shutdown; immediate; by force
    if (await endsWithin(exited, STOP_TIMEOUT_MS)) return;
  }
}

async function endsWithin(work: Promise<void>, timeoutMs: number): Promise<boolean> {
  const { promise: isLate, resolve } = Promise.withResolvers<boolean>();
  const timer = setTimeout(() => resolve(false), timeoutMs);
  try {
    return await Promise.race([work.then(() => true), isLate]);
  } finally {
    clearTimeout(timer);
  }
}

/** A zombie is gone, too: in a container nobody may ever collect it. */
function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return process.platform !== "linux" || !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, "latin1"));
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

/** The line that says why, of what PostgreSQL printed. */
function reasonIn(output: string): string {
  const lines = output.split("\n").filter((line) => line.trim() !== "");
  const reason = lines.findLast((line) => /(FATAL|PANIC|error|ERROR):/.test(line)) ?? lines.at(-1);
  return reason?.replace(/^.*?(FATAL|PANIC|error|ERROR):\s*/, "") ?? "it printed nothing";
}

function pause(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, POLL_MS));
}
