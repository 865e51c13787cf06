// `npm start` and `npm test`: gets the dependencies, then hands over to Bun, which came with them. Only Node's
// own modules here: nothing else is there yet. npm's install scripts may be switched off and NODE_ENV may be
// "production", so neither is relied on.

import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, realpathSync, statSync, writeFileSync } from "node:fs";
import { constants } from "node:os";
import { delimiter, dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

const ROOT = dirname(fileURLToPath(import.meta.url));

/** @type {Readonly<Record<string, string>>} */
const PROGRAMS = {
  start: "launcher/main.ts",
  test: "launcher/test.ts",
  edge: "edge/main.ts",
  sidecar: "sidecar/main.ts",
};

/** A stub that stands in for the real Bun is far smaller. */
const BUN_BYTES_MIN = 1_000_000;
const NODE_MAJOR_MIN = 20;
/** What the PostgreSQL binaries need. */
const GLIBC_MIN = 2.27;

/** Something that the person who typed the command can mend. */
class StartError extends Error {}

/**
 * What is wrong with this machine; null: nothing.
 * @param {{ platform: string, arch: string, nodeMajor: number, glibc: string | null }} machine
 * @returns {string | null}
 */
export function unsupported({ platform, arch, nodeMajor, glibc }) {
  if (nodeMajor < NODE_MAJOR_MIN) return `Node ${nodeMajor} is too old: install Node ${NODE_MAJOR_MIN} or newer`;
  if (!["linux", "darwin"].includes(platform) || !["x64", "arm64"].includes(arch)) {
    return `${platform}-${arch} is not supported: use Linux (glibc) or macOS on x64 or arm64`;
  }
  if (platform === "darwin") return null;
  if (glibc === null) {
    return "this Linux has no glibc (musl?), which is not supported: use a glibc-based image, such as Debian";
  }
  const [major = 0, minor = 0] = glibc.split(".").map(Number);
  return major + minor / 100 < GLIBC_MIN ? `glibc ${glibc} is too old: ${GLIBC_MIN} or newer is needed` : null;
}

/**
 * True when the dependencies are those of the lock file. What was installed by hand bears no stamp: then the
 * pinned versions decide.
 * @param {string} root
 */
export function isInstalled(root) {
  if (findBun(root) === null) return false;
  const stamp = stampPath(root);
  if (existsSync(stamp)) return readFileSync(stamp, "utf8") === stampText(root);
  const { dependencies, devDependencies } = readJson(join(root, "package.json"));
  return Object.entries({ ...dependencies, ...devDependencies }).every(([name, version]) => {
    const path = join(root, "node_modules", name, "package.json");
    return existsSync(path) && readJson(path).version === version;
  });
}

/**
 * The real Bun: its install script moves it from the platform's package to its own.
 * @param {string} root
 * @returns {string | null}
 */
export function findBun(root) {
  const modules = join(root, "node_modules");
  const platformPackages = existsSync(join(modules, "@oven")) ? readdirSync(join(modules, "@oven")).sort() : [];
  const candidates = [
    join(modules, "bun", "bin", "bun.exe"),
    ...platformPackages.map((name) => join(modules, "@oven", name, "bin", "bun")),
  ];
  return candidates.find((path) => existsSync(path) && statSync(path).size > BUN_BYTES_MIN) ?? null;
}

/** @param {string} root */
function stampPath(root) {
  return join(root, "node_modules", ".kvasir-installed");
}

/** @param {string} root */
function stampText(root) {
  const lock = createHash("sha256").update(readFileSync(join(root, "package-lock.json"))).digest("hex");
  return `${process.platform}-${process.arch} ${lock}\n`;
}

/**
 * @param {string} path
 * @returns {Record<string, any>}
 */
function readJson(path) {
  return JSON.parse(readFileSync(path, "utf8"));
}

/** Development dependencies too: types, lint and tests are part of what a clone can do. */
async function install() {
  console.log("installing the dependencies (once; about 450 MB on disk) ...");
  const startedAt = Date.now();
  const npm = process.env.npm_execpath ?? "";
  const args = ["ci", "--include=dev", "--include=optional", "--no-audit", "--no-fund"];
  const [program, programArgs] = /npm-cli\.c?js$/.test(npm)
    ? [process.execPath, [npm, ...args]]
    : ["npm", args];
  const code = await run(program, programArgs, { stdio: "inherit", cwd: ROOT });
  if (code !== 0) throw new StartError("npm could not install the dependencies: see above; then try again");
  if (findBun(ROOT) === null) {
    throw new StartError("npm installed no Bun for this platform: remove node_modules and try again");
  }
  writeFileSync(stampPath(ROOT), stampText(ROOT));
  console.log(`dependencies installed in ${Math.round((Date.now() - startedAt) / 1000)} s`);
}

/**
 * Runs a program to its end and passes signals on; those of a terminal have reached it already, and count once
 * (config/stop-signal.ts). Returns its exit code.
 * @param {string} program
 * @param {string[]} args
 * @param {import("node:child_process").SpawnOptions} options
 * @returns {Promise<number>}
 */
function run(program, args, options) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, options);
    for (const signal of /** @type {const} */ (["SIGINT", "SIGTERM", "SIGHUP"])) {
      process.on(signal, () => child.kill(signal));
    }
    child.once("error", (error) => reject(new StartError(`cannot run ${program}: ${error.message}`)));
    child.once("exit", (code, signal) => resolve(code ?? 128 + (signal ? constants.signals[signal] : 0)));
  });
}

/** @returns {string | null} */
function glibcVersion() {
  if (process.versions.bun !== undefined) return process.platform === "linux" ? "2.99" : null; // it runs, so it fits
  const report = /** @type {any} */ (process.report);
  report.excludeNetwork = true;
  return report.getReport().header.glibcVersionRuntime ?? null;
}

async function main() {
  const problem = unsupported({
    platform: process.platform,
    arch: process.arch,
    nodeMajor: Number(process.versions.node.split(".")[0]),
    glibc: glibcVersion(),
  });
  if (problem !== null) throw new StartError(problem);
  const [command = "start", ...args] = process.argv.slice(2);
  const program = PROGRAMS[command];
  if (program === undefined) {
    throw new StartError(`there is no command "${command}": use one of ${Object.keys(PROGRAMS).join(", ")}`);
  }
  if (!isInstalled(ROOT)) await install();
  const bun = /** @type {string} */ (findBun(ROOT));
  const path = [dirname(bun), join(ROOT, "node_modules", ".bin"), process.env.PATH].join(delimiter);
  const env = { ...process.env, PATH: path };
  // The end of its input tells a server that this process is gone, however it went.
  process.exitCode = await (command === "test"
    ? run(bun, [join(ROOT, program), ...args], { stdio: "inherit", cwd: ROOT, env })
    : run(bun, [join(ROOT, program), ...args], {
        stdio: ["pipe", "inherit", "inherit"],
        env: { ...env, KVASIR_PARENT_PIPE: "1" },
      }));
}

if (process.argv[1] !== undefined && fileURLToPath(import.meta.url) === realpathSync(process.argv[1])) {
  try {
    await main();
  } catch (error) {
    console.error("kvasir:", error instanceof StartError ? error.message : error);
    process.exitCode = 1;
  }
}
