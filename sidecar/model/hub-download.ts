// Downloads one file of the hub into a blob: by Range requests, so that a broken download goes on where it
// stopped, also in a later process; checked by size and content hash before it gets its name. Bytes are
// written at their own offsets, so two processes that download the same blob at once do no harm.

import { createHash, type Hash } from "node:crypto";
import { existsSync } from "node:fs";
import { type FileHandle, mkdir, open, rename, rm, stat } from "node:fs/promises";
import { dirname } from "node:path";

export interface RemoteFile {
  readonly path: string;
  readonly url: string;
  readonly bytes: number;
  /** Name of the blob, and its content hash: SHA-256, or git's SHA-1 over "blob <size>\0" and the content. */
  readonly blobId: string;
  readonly hash: "sha256" | "git";
}

export interface DownloadOptions {
  readonly token: string | null;
  /** Before another try; doubled each time nothing came. */
  readonly retryDelayMs: number;
  /** Called with bytes that are new, or found on disk; negative when a broken blob is started over. */
  readonly onBytes: (bytes: number) => void;
}

export class DownloadError extends Error {
  override name = "DownloadError";
  constructor(
    message: string,
    /** Null: no answer at all. */
    readonly statusCode: number | null,
    readonly isRetryable: boolean,
  ) {
    super(message);
  }
}

/** Tries in a row without a single new byte. */
const FRUITLESS_TRIES_MAX = 5;
const REDIRECTS_MAX = 5;
const READ_BYTES = 2 ** 20;

/** Makes `blob` the file's content. Throws DownloadError. */
export async function downloadBlob(file: RemoteFile, blob: string, options: DownloadOptions): Promise<void> {
  if (existsSync(blob)) {
    options.onBytes(file.bytes);
    return;
  }
  await mkdir(dirname(blob), { recursive: true });
  const partial = `${blob}.incomplete`;
  const handle = await open(partial, existsSync(partial) ? "r+" : "w+");
  try {
    const download = new PartialDownload(file, handle, options);
    await download.adopt();
    await download.run();
    await handle.sync();
  } catch (error) {
    if (error instanceof CorruptBlob) await rm(partial, { force: true });
    throw error;
  } finally {
    await handle.close();
  }
  await rename(partial, blob).catch(async (error: unknown) => {
    // Another process finished it first.
    if (!(await stat(blob).catch(() => null))) throw error;
  });
}

class CorruptBlob extends DownloadError {}

class PartialDownload {
  #doneBytes = 0;
  #hash: Hash;

  constructor(
    readonly file: RemoteFile,
    readonly handle: FileHandle,
    readonly options: DownloadOptions,
  ) {
    this.#hash = newHash(file);
  }

  /** Takes over what an earlier process left. */
  async adopt(): Promise<void> {
    const { size } = await this.handle.stat();
    if (size > this.file.bytes) await this.handle.truncate(0);
    const buffer = new Uint8Array(READ_BYTES);
    for (;;) {
      const { bytesRead } = await this.handle.read(buffer, 0, buffer.length, this.#doneBytes);
      if (bytesRead === 0) return;
      this.#count(buffer.subarray(0, bytesRead));
    }
  }

  async run(): Promise<void> {
    let fruitlessTries = 0;
    while (this.#doneBytes < this.file.bytes) {
      const before = this.#doneBytes;
      try {
        await this.#receive();
      } catch (error) {
        const failure = asDownloadError(this.file, error);
        fruitlessTries = this.#doneBytes > before ? 0 : fruitlessTries + 1;
        if (!failure.isRetryable || fruitlessTries >= FRUITLESS_TRIES_MAX) throw failure;
        await Bun.sleep(this.options.retryDelayMs * 2 ** fruitlessTries);
      }
    }
    const digest = this.#hash.digest("hex");
    if (digest === this.file.blobId) return;
    this.options.onBytes(-this.#doneBytes);
    const reason = `what came has hash ${digest}, not ${this.file.blobId}; it was removed, try again`;
    throw new CorruptBlob(`${this.file.path}: ${reason}`, null, false);
  }

  /** One request for all that is missing. */
  async #receive(): Promise<void> {
    const response = await request(this.file.url, this.#doneBytes, this.options.token);
    const isWhole = response.status === 200;
    // A server that ignores Range sends the file from its start: skip what is there.
    let skip = isWhole ? this.#doneBytes : 0;
    for await (const chunk of response.body ?? []) {
      const skipped = Math.min(skip, chunk.length);
      skip -= skipped;
      const news = chunk.subarray(skipped, skipped + this.file.bytes - this.#doneBytes);
      if (news.length === 0) continue;
      await this.handle.write(news, 0, news.length, this.#doneBytes);
      this.#count(news);
    }
    if (this.#doneBytes < this.file.bytes) {
      throw new DownloadError(`${this.file.path}: the connection ended early`, null, true);
    }
  }

  #count(bytes: Uint8Array): void {
    this.#hash.update(bytes);
    this.#doneBytes += bytes.length;
    this.options.onBytes(bytes.length);
  }
}

function newHash({ hash, bytes }: RemoteFile): Hash {
  return hash === "sha256" ? createHash("sha256") : createHash("sha1").update(`blob ${bytes}\0`);
}

/** GET from `offset` on. Redirects are followed here: the token goes to the hub alone, never to its
 * storage hosts. */
async function request(url: string, offset: number, token: string | null): Promise<Response> {
  const { origin } = new URL(url);
  let at = url;
  for (let redirects = 0; redirects <= REDIRECTS_MAX; redirects++) {
    const headers = new Headers();
    // "identity": a range of compressed bytes would be of no use.
    headers.set("accept-encoding", "identity");
    if (offset > 0) headers.set("range", `bytes=${offset}-`);
    if (token !== null && new URL(at).origin === origin) headers.set("authorization", `Bearer ${token}`);
    const response = await fetch(at, { headers, redirect: "manual" });
    const location = response.headers.get("location");
    if (response.status >= 300 && response.status < 400 && location !== null) {
      await response.body?.cancel();
      at = new URL(location, at).href;
      continue;
    }
    if (response.status === 200 || (response.status === 206 && offset > 0)) return response;
    await response.body?.cancel();
    const isRetryable = response.status >= 500 || response.status === 429 || response.status === 408;
    throw new DownloadError(`${url}: status ${response.status}`, response.status, isRetryable);
  }
  throw new DownloadError(`${url}: more than ${REDIRECTS_MAX} redirects`, null, false);
}

/** Errors of fetch (refused, reset, cut) say nothing of the file and may pass. */
function asDownloadError(file: RemoteFile, error: unknown): DownloadError {
  if (error instanceof DownloadError) return error;
  const { code, message } = error as NodeJS.ErrnoException;
  const isLocal = ["ENOSPC", "EACCES", "EROFS", "EIO", "EDQUOT"].includes(code ?? "");
  return new DownloadError(`${file.path}: ${message}`, null, !isLocal);
}
