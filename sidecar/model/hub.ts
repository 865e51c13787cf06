// A model by name: a directory as it is, or org/name of the Hugging Face hub, downloaded into the usual cache
// (models--org--name/{blobs,refs,snapshots}), so that other programs find it there and theirs is found here.

import { existsSync, readFileSync } from "node:fs";
import { mkdir, statfs, symlink, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join, relative } from "node:path";
import { HubApiError, listFiles, modelInfo } from "@huggingface/hub";
import { DownloadError, downloadBlob, type RemoteFile } from "./hub-download.ts";
import { readJsonObject } from "./json-fields.ts";

/** The model cannot be had; the message says why and what to do. */
export class HubError extends Error {
  override name = "HubError";
}

export interface ResolveModelOptions {
  readonly onProgress: (message: string) => void;
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Pause before a broken download goes on; doubled each time nothing came. */
  readonly retryDelayMs?: number;
}

const RETRY_DELAY_MS = 1000;
/** org/name, with an optional branch, tag or commit behind "@". */
const HUB_NAME = /^([\w.-]+\/[\w.-]+?)(?:@([\w./-]+))?$/;
const COMMIT = /^[0-9a-f]{40}$/;
/** What a model directory needs; no other formats, no other frameworks' weights. */
const WANTED_FILES = new RegExp(
  [
    "^(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|chat_template)\\.json$",
    "^chat_template\\.jinja$",
    "^model(-\\d+-of-\\d+)?\\.safetensors$",
    "^model\\.safetensors\\.index\\.json$",
  ].join("|"),
);

/** Directory of the model. Throws HubError. */
export async function resolveModel(model: string, options: ResolveModelOptions): Promise<string> {
  if (existsSync(model)) {
    if (existsSync(join(model, "config.json"))) return model;
    throw new HubError(`${model} is not a model directory: there is no config.json in it`);
  }
  const match = HUB_NAME.exec(model);
  if (match === null) {
    throw new HubError(`there is no directory ${model}, and it is not org/name of a hub model`);
  }
  const hub = readHub(match[1]!, match[2] ?? "main", options);
  if (hub.isOffline) return cachedSnapshot(hub) ?? refuseOffline(hub);
  try {
    return await downloadModel(hub, options);
  } catch (error) {
    return fallBack(hub, error as Error, options);
  }
}

/** The hub as the environment describes it, and the model that is wanted of it. */
interface Hub {
  readonly name: string;
  readonly revision: string;
  readonly endpoint: string;
  readonly accessToken: string | undefined;
  readonly isOffline: boolean;
  /** models--org--name */
  readonly cache: string;
}

function readHub(name: string, revision: string, { env = process.env }: ResolveModelOptions): Hub {
  const home = env["HF_HOME"] ?? join(env["XDG_CACHE_HOME"] ?? join(homedir(), ".cache"), "huggingface");
  const cacheRoot = env["HF_HUB_CACHE"] ?? env["HUGGINGFACE_HUB_CACHE"] ?? join(home, "hub");
  const tokenFile = env["HF_TOKEN_PATH"] ?? join(home, "token");
  const fileToken = existsSync(tokenFile) ? readFileSync(tokenFile, "utf8").trim() : undefined;
  return {
    name,
    revision,
    endpoint: (env["HF_ENDPOINT"] ?? "https://huggingface.co").replace(/\/+$/, ""),
    accessToken: env["HF_TOKEN"] || fileToken || undefined,
    isOffline: ["1", "true", "yes", "on"].includes((env["HF_HUB_OFFLINE"] ?? "").toLowerCase()),
    cache: join(cacheRoot, `models--${name.replace("/", "--")}`),
  };
}

async function downloadModel(hub: Hub, options: ResolveModelOptions): Promise<string> {
  const access = { hubUrl: hub.endpoint, ...(hub.accessToken && { accessToken: hub.accessToken }) };
  const { name, revision } = hub;
  const { sha } = await modelInfo({ name, revision, additionalFields: ["sha"], ...access });
  const snapshot = join(hub.cache, "snapshots", sha);
  const files: RemoteFile[] = [];
  for await (const entry of listFiles({ repo: name, revision: sha, ...access })) {
    if (entry.type !== "file" || !WANTED_FILES.test(entry.path)) continue;
    files.push(remoteFile(hub, sha, entry));
  }
  checkWanted(hub, files);
  const missing = files.filter(({ path }) => !existsSync(join(snapshot, path)));
  await checkRoom(hub, missing);
  const totalBytes = missing.reduce((sum, { bytes }) => sum + bytes, 0);
  const progress = new Progress(name, totalBytes, options.onProgress);
  for (const file of missing) {
    const blob = join(hub.cache, "blobs", file.blobId);
    const retryDelayMs = options.retryDelayMs ?? RETRY_DELAY_MS;
    const token = hub.accessToken ?? null;
    await downloadBlob(file, blob, { token, retryDelayMs, onBytes: (bytes) => progress.add(bytes) });
    await link(blob, join(snapshot, file.path));
  }
  // Last, so that a ref never names a snapshot that is not all there.
  if (!COMMIT.test(revision)) {
    const ref = join(hub.cache, "refs", revision);
    await mkdir(dirname(ref), { recursive: true });
    await writeFile(ref, sha);
  }
  return snapshot;
}

/** An entry of the hub's file list; the blob is named as other programs name it: SHA-256 of big files, git
 * id of small. */
function remoteFile(
  hub: Hub,
  sha: string,
  entry: { path: string; size: number; oid?: string; lfs?: { oid: string; size: number } },
): RemoteFile {
  const path = entry.path.split("/").map(encodeURIComponent).join("/");
  const blobId = entry.lfs?.oid ?? entry.oid ?? "";
  if (!/^[0-9a-f]{40,64}$/.test(blobId)) {
    throw new HubError(`${hub.name}: ${entry.path} has no usable id (${blobId})`);
  }
  return {
    path: entry.path,
    url: `${hub.endpoint}/${hub.name}/resolve/${sha}/${path}`,
    bytes: entry.lfs?.size ?? entry.size,
    blobId,
    hash: entry.lfs === undefined ? "git" : "sha256",
  };
}

function checkWanted(hub: Hub, files: readonly RemoteFile[]): void {
  const has = (pattern: RegExp): boolean => files.some(({ path }) => pattern.test(path));
  const lacks = (what: string): never => {
    throw new HubError(`${hub.name} has no ${what}: look for a version of it that has them`);
  };
  if (!has(/^config\.json$/)) lacks("config.json");
  if (!has(/\.safetensors$/)) lacks("safetensors weights");
  if (!has(/^tokenizer\.json$/)) lacks("tokenizer.json");
}

async function checkRoom(hub: Hub, missing: readonly RemoteFile[]): Promise<void> {
  await mkdir(join(hub.cache, "blobs"), { recursive: true });
  const { bavail, bsize } = await statfs(hub.cache);
  const neededBytes = missing.reduce((sum, { bytes }) => sum + bytes, 0);
  if (neededBytes <= bavail * bsize) return;
  const [needed, free] = [gigabytes(neededBytes), gigabytes(bavail * bsize)];
  throw new HubError(
    `${hub.name} needs ${needed}, but ${hub.cache} has ${free} left: free some, or set HF_HOME`,
  );
}

async function link(blob: string, path: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  try {
    await symlink(relative(dirname(path), blob), path);
  } catch (error) {
    // Another process got there first.
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  }
}

/** The snapshot that the ref names, if it is all there. */
function cachedSnapshot(hub: Hub): string | null {
  const sha = cachedCommit(hub);
  if (sha === null) return null;
  const snapshot = join(hub.cache, "snapshots", sha);
  const has = (file: string): boolean => existsSync(join(snapshot, file));
  if (!has("config.json") || !has("tokenizer.json")) return null;
  if (has("model.safetensors")) return snapshot;
  const index = join(snapshot, "model.safetensors.index.json");
  if (!existsSync(index)) return null;
  const shards = new Set(Object.values(readJsonObject(index)["weight_map"] ?? {}));
  return [...shards].every((shard) => has(String(shard))) ? snapshot : null;
}

function cachedCommit({ cache, revision }: Hub): string | null {
  if (COMMIT.test(revision)) return revision;
  const ref = join(cache, "refs", revision);
  return existsSync(ref) ? readFileSync(ref, "utf8").trim() : null;
}

function refuseOffline(hub: Hub): never {
  throw new HubError(
    `${hub.name} is not in the cache ${hub.cache}, and HF_HUB_OFFLINE forbids to download it`,
  );
}

/** What went wrong, in terms of the person's next step; a model in the cache is used when the hub does not
 * answer. */
function fallBack(hub: Hub, error: Error, { onProgress }: ResolveModelOptions): string {
  if (error instanceof HubError) throw error;
  const status = error instanceof HubApiError || error instanceof DownloadError ? error.statusCode : null;
  if (status === 401 || status === 403) {
    const advice =
      hub.accessToken === undefined ? "set HF_TOKEN" : "HF_TOKEN has no access: ask for it on its page";
    throw new HubError(`${hub.name} is private, gated or does not exist (${status}): ${advice}`);
  }
  if (status === 404) {
    throw new HubError(
      `${hub.endpoint} has no model ${hub.name} at ${hub.revision}, and there is no such directory`,
    );
  }
  const snapshot = cachedSnapshot(hub);
  if (snapshot === null) {
    throw new HubError(`cannot download ${hub.name} from ${hub.endpoint}: ${error.message}`);
  }
  onProgress(`${hub.endpoint} cannot be asked (${error.message}): using ${hub.name} from the cache`);
  return snapshot;
}

const PROGRESS_EVERY_MS = 1000;

/** Says where a download stands, about once a second while it moves, and at its end. */
class Progress {
  #doneBytes = 0;
  #saidPercent = -1;
  #saidAtMs = -Infinity;

  constructor(
    readonly name: string,
    readonly totalBytes: number,
    readonly say: (message: string) => void,
  ) {}

  /** bytes: had since the last call, or found to be there already. */
  add(bytes: number): void {
    this.#doneBytes += bytes;
    const percent = Math.floor((100 * this.#doneBytes) / this.totalBytes);
    const nowMs = performance.now();
    if (percent <= this.#saidPercent || (percent < 100 && nowMs < this.#saidAtMs + PROGRESS_EVERY_MS)) return;
    this.#saidPercent = percent;
    this.#saidAtMs = nowMs;
    this.say(`downloading ${this.name}: ${percent} % of ${gigabytes(this.totalBytes)}`);
  }
}

function gigabytes(bytes: number): string {
  return bytes < 1e8 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}
