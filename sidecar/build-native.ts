// Builds the native library from its sources, once: objects and library are named by a hash of everything
// that goes into them (sources, headers, flags, compiler), so a second start compiles nothing, an edit compiles
// what it touches, and builders that run at once at worst do the same work twice, each with its own files.

import { spawn } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { existsSync, readdirSync, readFileSync, statSync, utimesSync } from "node:fs";
import { access, mkdir, rename, rm } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export type Backend = "auto" | "cpu" | "cuda";

/** The library cannot be built; the message says why and what to do. */
export class BuildError extends Error {
  override name = "BuildError";
}

export interface BuildOptions {
  readonly onProgress: (message: string) => void;
  /** Ends the compilers; the build then throws the signal's reason. */
  readonly signal?: AbortSignal;
  /** Folder with common/, cpu/ and cuda/. */
  readonly sources?: string;
  readonly output?: string;
  /** Programs to try, in this order. */
  readonly compilers?: readonly string[];
  /** Compute capabilities ("8.0") to build CUDA kernels for; default: of the GPUs here, and then there must be one. */
  readonly computeCapabilities?: readonly string[];
}

const SOURCES = fileURLToPath(new URL("./native", import.meta.url));
const OUTPUT = fileURLToPath(new URL("../build/native", import.meta.url));
/** What is older, and was not used since, is removed after a build. */
const KEEP_MS = 7 * 86_400_000;
const ERROR_LINES = 20;

interface Toolchain {
  readonly library: "cpu" | "cuda";
  /** Folders whose sources make the library. */
  readonly folders: readonly string[];
  readonly compilers: readonly string[];
  readonly compileFlags: readonly string[];
  readonly linkFlags: readonly string[];
  readonly missing: string;
}

const CPU: Toolchain = {
  library: "cpu",
  folders: ["common", "cpu"],
  compilers: ["g++", "clang++"],
  // No contraction: where multiplies and adds fuse is said in the source, so that every path of a kernel rounds alike.
  compileFlags: [
    "-std=c++20", "-O3", "-fPIC", "-pthread", "-fno-semantic-interposition", "-ffp-contract=off", "-Wall", "-Wextra",
  ],
  linkFlags: process.platform === "linux" ? ["-shared", "-pthread", "-Wl,-z,defs,-z,now"] : ["-shared", "-pthread"],
  missing:
    "there is no C++ compiler: install g++ 10 or newer " +
    "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)",
};

const NVCC_PROGRAMS = ["nvcc", "/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"];
const NVCC_VERSION_MIN = [12, 8] as const;
const CAPABILITY_MIN = 80;

/**
 * Instruction sets by file name, in link order: see `objectsInLinkOrder`. These kernels are written in vectors: -O3
 * makes them no faster and takes twice as long.
 */
const ISA_FLAGS: readonly (readonly [suffix: string, flags: readonly string[]])[] = [
  [".avx2.cpp", ["-O2", "-mavx2", "-mfma", "-mf16c"]],
  [".avx512.cpp", ["-O2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]],
];

/** Returns the path of the library, built if needed. Throws BuildError; with "auto" only when the CPU library cannot be
 * built either: what is in the way of a GPU is told, and the CPU serves. */
export async function buildNative(backend: Backend, options: BuildOptions): Promise<string> {
  if (backend === "cpu") return await build(CPU, options);
  if (backend === "auto" && !hasGpu()) return await build(CPU, options);
  try {
    return await build(await cudaToolchain(options), options);
  } catch (error) {
    if (backend === "cuda" || !(error instanceof BuildError)) throw error;
    options.onProgress(`${error.message}: using the CPU`);
    return await build(CPU, options);
  }
}

async function build(toolchain: Toolchain, options: BuildOptions): Promise<string> {
  const { sources = SOURCES, output = OUTPUT, signal } = options;
  const compiler = await findCompiler(options.compilers ?? toolchain.compilers, toolchain.missing);
  const units = listUnits(sources, toolchain, compiler);
  const key = digest(compiler.version, toolchain.linkFlags.join(" "), ...units.map((unit) => unit.key));
  const library = join(output, `libkvasir_${toolchain.library}-${key}.so`);
  if (isUsable(library)) return library;
  await makeFolder(join(output, "objects"));
  await compileAll(units, { compiler, output, ...options, library: toolchain.library });
  const objects = objectsInLinkOrder(units).map((unit) => objectPath(output, unit));
  await makeFile(library, (path) =>
    run(compiler.program, [...toolchain.linkFlags, "-o", path, ...objects], "linking", signal),
  );
  await removeOld(output);
  return library;
}

function hasGpu(): boolean {
  return existsSync("/dev/nvidia0") || existsSync("/dev/nvidiactl");
}

/** Throws BuildError, in one line: no GPU, driver or nvcc, or too old a one. */
async function cudaToolchain(options: BuildOptions): Promise<Toolchain> {
  const capabilities = options.computeCapabilities ?? (await findCapabilities());
  const missing = "there is no nvcc: install the CUDA toolkit 12.8 or newer (--backend cpu needs none)";
  const nvcc = await findCompiler(options.compilers ?? NVCC_PROGRAMS, missing);
  const release = /release (\d+)\.(\d+)/.exec(nvcc.version);
  const [major, minor] = [Number(release?.[1] ?? 0), Number(release?.[2] ?? 0)];
  const [majorMin, minorMin] = NVCC_VERSION_MIN;
  if (major < majorMin || (major === majorMin && minor < minorMin)) {
    throw new BuildError(`nvcc ${major}.${minor} is too old: the CUDA toolkit 12.8 or newer is needed`);
  }
  const known = await run(nvcc.program, ["--list-gpu-code"], `${nvcc.program} --list-gpu-code`);
  const targets = [...new Set(capabilities.map((capability) => targetOf(capability, known)))];
  return {
    library: "cuda",
    folders: ["common", "cuda"],
    compilers: [nvcc.program],
    compileFlags: ["-std=c++20", "-O3", ...targets, "-Xcompiler=-fPIC,-pthread,-Wall,-Wextra"],
    linkFlags: ["-shared", ...targets, "-Xlinker=-z,defs,-z,now"],
    missing,
  };
}

/** The code that nvcc makes for a GPU. Hopper's own instructions are in sm_90a alone; a GPU newer than nvcc gets code
 * that its driver translates. */
function targetOf(capability: string, knownCodes: string): string {
  const number = capability.replace(".", "");
  if (number === "90") return "-gencode=arch=compute_90a,code=sm_90a";
  if (new RegExp(`\\bsm_${number}\\b`).test(knownCodes)) {
    return `-gencode=arch=compute_${number},code=sm_${number}`;
  }
  return "-gencode=arch=compute_90,code=compute_90";
}

/** Of the GPUs that the driver shows. Throws BuildError when there is none that can be used. */
async function findCapabilities(): Promise<string[]> {
  if (!hasGpu()) throw new BuildError("there is no NVIDIA GPU here (no /dev/nvidia0): choose --backend cpu");
  if (Bun.which("nvidia-smi") === null) {
    throw new BuildError("there is a GPU, but no nvidia-smi: install the NVIDIA driver, or choose --backend cpu");
  }
  const query = ["--query-gpu=compute_cap", "--format=csv,noheader"];
  const output = await run("nvidia-smi", query, "the NVIDIA driver");
  const all = output.split("\n").map((line) => line.trim()).filter((line) => /^\d+\.\d+$/.test(line));
  const usable = all.filter((capability) => Number(capability.replace(".", "")) >= CAPABILITY_MIN);
  if (usable.length > 0) return usable;
  const found = all.length > 0 ? `compute capability ${all.join(", ")}` : "no GPU that its driver shows";
  throw new BuildError(`${found}: 8.0 or more is needed for --backend cuda`);
}

interface Compiler {
  readonly program: string;
  readonly version: string;
}

async function findCompiler(programs: readonly string[], missing: string): Promise<Compiler> {
  const program = programs.find((candidate) => Bun.which(candidate) !== null);
  if (program === undefined) throw new BuildError(missing);
  return { program, version: await run(program, ["--version"], `${program} --version`) };
}

/** One file to compile. */
interface Unit {
  /** Relative to the sources. */
  readonly path: string;
  readonly source: string;
  readonly flags: readonly string[];
  readonly key: string;
}

/** Any header may be in any file: all of them are part of each key. */
function listUnits(sources: string, toolchain: Toolchain, { version }: Compiler): Unit[] {
  const files = readdirSync(sources, { recursive: true, encoding: "utf8" })
    .filter((path) => !path.includes("/") || toolchain.folders.includes(path.split("/")[0]!))
    .sort();
  const headers = files
    .filter((path) => /\.(h|hpp|cuh|inc)$/.test(path))
    .map((path) => `${path}\n${readFileSync(join(sources, path), "utf8")}`);
  const headersKey = digest(...headers);
  const paths = files.filter((path) => /\.(cpp|cu)$/.test(path));
  if (!paths.some((path) => path.startsWith(`${toolchain.library}/`))) {
    throw new BuildError(`${sources}/${toolchain.library} has no sources: is the checkout complete?`);
  }
  return paths.map((path) => {
    const source = join(sources, path);
    const flags = [...toolchain.compileFlags, ...isaFlags(path)];
    const key = digest(version, flags.join(" "), headersKey, path, readFileSync(source, "utf8"));
    return { path, source, flags, key };
  });
}

function isaFlags(path: string): readonly string[] {
  if (process.arch !== "x64") return []; // there these files are empty
  return ISA_FLAGS.find(([suffix]) => path.endsWith(suffix))?.[1] ?? [];
}

/**
 * Inline functions of the standard library come out of every object that uses them, and the linker takes the
 * first: plain objects go first, so that no code for newer processors runs on an older one.
 */
function objectsInLinkOrder(units: readonly Unit[]): Unit[] {
  const rank = (unit: Unit) => ISA_FLAGS.findIndex(([suffix]) => unit.path.endsWith(suffix));
  return units.toSorted((a, b) => rank(a) - rank(b));
}

function objectPath(output: string, unit: Unit): string {
  return join(output, "objects", `${unit.key}.o`);
}

interface CompileJob {
  readonly compiler: Compiler;
  readonly output: string;
  readonly library: string;
  readonly onProgress: (message: string) => void;
  readonly signal?: AbortSignal;
}

/** As many compilers at once as there are cores; the first error stops the rest. */
async function compileAll(units: readonly Unit[], job: CompileJob): Promise<void> {
  const missing = units.filter((unit) => !isUsable(objectPath(job.output, unit)));
  const total = missing.length;
  if (total > 0) job.onProgress(`building the ${job.library} library: ${total} files`);
  let done = 0;
  let hasFailed = false;
  const worker = async () => {
    for (let unit = missing.shift(); unit !== undefined && !hasFailed; unit = missing.shift()) {
      const { source, flags, path } = unit;
      try {
        await makeFile(objectPath(job.output, unit), (object) =>
          run(job.compiler.program, [...flags, "-c", "-o", object, source], path, job.signal),
        );
      } catch (error) {
        hasFailed = true;
        throw error;
      }
      job.onProgress(`  ${++done}/${total} ${path}`);
    }
  };
  const results = await Promise.allSettled(Array.from({ length: availableParallelism() }, worker));
  for (const result of results) if (result.status === "rejected") throw result.reason;
}

/** Under its final name a file is always complete. */
async function makeFile(path: string, make: (temporaryPath: string) => Promise<unknown>): Promise<void> {
  const temporaryPath = `${path}.${randomBytes(6).toString("hex")}.tmp`;
  try {
    await make(temporaryPath);
    await rename(temporaryPath, path);
  } finally {
    await rm(temporaryPath, { force: true });
  }
}

async function makeFolder(path: string): Promise<void> {
  try {
    await mkdir(path, { recursive: true });
    await access(path, 2);
  } catch (error) {
    throw new BuildError(`cannot write the build to ${path} (${(error as Error).message})`);
  }
}

/** True when the file is there; its time then says that it was used. */
function isUsable(path: string): boolean {
  if (!existsSync(path)) return false;
  const now = new Date();
  try {
    utimesSync(path, now, now);
  } catch (error) {
    // Built by another user: usable all the same.
    if (!["EPERM", "EACCES", "EROFS"].includes((error as NodeJS.ErrnoException).code ?? "")) throw error;
  }
  return true;
}

async function removeOld(output: string): Promise<void> {
  const oldest = Date.now() - KEEP_MS;
  for (const entry of readdirSync(output, { recursive: true, encoding: "utf8" })) {
    const path = join(output, entry);
    const stat = statSync(path, { throwIfNoEntry: false });
    if (stat?.isFile() === true && stat.mtimeMs < oldest) await rm(path, { force: true });
  }
}

/** Returns what the program printed. Throws BuildError with its first lines when it fails. */
async function run(
  program: string,
  args: readonly string[],
  what: string,
  signal?: AbortSignal,
): Promise<string> {
  signal?.throwIfAborted();
  // A compiler is several processes: as a group of their own they can be ended together.
  const child = spawn(program, args, { stdio: ["ignore", "pipe", "pipe"], detached: true });
  const kill = () => {
    if (child.pid !== undefined) process.kill(-child.pid, "SIGTERM");
  };
  signal?.addEventListener("abort", kill, { once: true });
  let output = "";
  let errors = "";
  child.stdout.on("data", (chunk: Buffer) => (output += chunk.toString()));
  child.stderr.on("data", (chunk: Buffer) => (errors += chunk.toString()));
  const code = await new Promise<number | null>((resolve, reject) => {
    child.once("error", (error) => reject(new BuildError(`${program} does not run: ${error.message}`)));
    child.once("close", resolve);
  });
  signal?.removeEventListener("abort", kill);
  if (code === 0) return output;
  signal?.throwIfAborted();
  const text = (errors || output).split("\n").slice(0, ERROR_LINES).join("\n");
  throw new BuildError(`${what}: ${program} failed (${code ?? "killed"}):\n${text}`);
}

/** 128 bits of SHA-256 over the parts, each with its length. */
function digest(...parts: readonly string[]): string {
  const hash = createHash("sha256");
  for (const part of parts) hash.update(`${part.length}:`).update(part);
  return hash.digest("hex").slice(0, 32);
}
