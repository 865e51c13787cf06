// A small server that speaks the Hugging Face hub's API: model info, file tree, resolve with redirects, ETag
// and Range; it can be gated, break connections and count what was asked of it. Big files come from a second
// origin, as from the hub's storage.

import { createHash } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

export interface HubFile {
  readonly content: Uint8Array;
  /** Served from the storage origin, named by SHA-256. */
  readonly isLfs: boolean;
}

export interface HubRequest {
  readonly origin: "hub" | "storage";
  readonly path: string;
  readonly range: string | null;
  readonly authorization: string | null;
}

export class HubServer {
  /** Files of "org/name". */
  readonly models = new Map<string, Readonly<Record<string, HubFile>>>();
  readonly requests: HubRequest[] = [];
  /** Token that the models ask for; null: public. */
  token: string | null = null;
  /** Destroys the connection after this many bytes of a body; each entry is used once, for one storage
   * request. */
  readonly cuts: number[] = [];
  /** Answers storage requests with the whole file, whatever range is asked. */
  ignoresRange = false;
  /** Bytes that storage sends in place of a file's own. */
  readonly tampered = new Map<string, Uint8Array>();
  readonly #hub: Server;
  readonly #storage: Server;

  private constructor() {
    this.#hub = createServer((request, response) => this.#answerHub(request, response));
    this.#storage = createServer((request, response) => this.#answerStorage(request, response));
  }

  static async start(): Promise<HubServer> {
    const server = new HubServer();
    await Promise.all([listen(server.#hub), listen(server.#storage)]);
    return server;
  }

  get url(): string {
    return urlOf(this.#hub);
  }

  /** The commit of "org/name": changes with its files. */
  commitOf(model: string): string {
    const hash = createHash("sha1").update(model);
    for (const [path, { content }] of Object.entries(this.models.get(model)!)) {
      hash.update(path).update(content);
    }
    return hash.digest("hex");
  }

  async stop(): Promise<void> {
    await Promise.all([close(this.#hub), close(this.#storage)]);
  }

  #answerHub(request: IncomingMessage, response: ServerResponse): void {
    const { pathname } = this.#note("hub", request);
    const [, model, rest] = /^(?:\/api\/models)?\/([^/]+\/[^/]+)\/(.+)$/.exec(pathname) ?? [];
    if (model === undefined || rest === undefined) return notFound(response, "RepoNotFound");
    if (this.token !== null && request.headers.authorization !== `Bearer ${this.token}`) {
      return sendJson(response, 401, { error: "Access is restricted" }, { "x-error-code": "GatedRepo" });
    }
    if (!this.models.has(model)) return notFound(response, "RepoNotFound");
    const commit = this.commitOf(model);
    const [verb, revision, ...path] = rest.split("/");
    if (revision !== "main" && revision !== commit) return notFound(response, "RevisionNotFound");
    switch (verb) {
      case "revision":
        return sendJson(response, 200, { _id: "1", id: model, sha: commit, private: false });
      case "tree":
        return sendJson(response, 200, this.#tree(model));
      case "resolve":
        return this.#resolve(model, decodeURIComponent(path.join("/")), request, response);
      default:
        return notFound(response, "EntryNotFound");
    }
  }

  #tree(model: string): object[] {
    return Object.entries(this.models.get(model)!).map(([path, { content, isLfs }]) => ({
      type: "file",
      path,
      size: content.length,
      oid: gitId(content),
      lfs: isLfs ? { oid: sha256(content), size: content.length, pointerSize: 134 } : undefined,
    }));
  }

  #resolve(model: string, path: string, request: IncomingMessage, response: ServerResponse): void {
    const file = this.models.get(model)![path];
    if (file === undefined) return notFound(response, "EntryNotFound");
    if (!file.isLfs) return sendRange(request, response, file.content, `"${gitId(file.content)}"`);
    const location = `${urlOf(this.#storage)}/${encodeURIComponent(model)}/${encodeURIComponent(path)}`;
    response.writeHead(302, { location, "x-linked-etag": `"${sha256(file.content)}"` }).end();
  }

  #answerStorage(request: IncomingMessage, response: ServerResponse): void {
    const { pathname } = this.#note("storage", request);
    const [model, path] = pathname.slice(1).split("/").map(decodeURIComponent);
    const file = this.models.get(model!)?.[path!];
    if (file === undefined) return notFound(response, "EntryNotFound");
    if (this.ignoresRange) delete request.headers.range;
    const content = this.tampered.get(path!) ?? file.content;
    sendRange(request, response, content, `"${sha256(content)}"`, this.cuts.shift());
  }

  #note(origin: HubRequest["origin"], request: IncomingMessage): URL {
    const url = new URL(request.url!, "http://hub");
    const { range, authorization } = request.headers;
    const noted = { origin, path: url.pathname, range: range ?? null, authorization: authorization ?? null };
    this.requests.push(noted);
    return url;
  }
}

function sendRange(
  request: IncomingMessage,
  response: ServerResponse,
  content: Uint8Array,
  etag: string,
  cutAfterBytes?: number,
): void {
  const begin = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0);
  const body = content.subarray(begin);
  const range = { "content-range": `bytes ${begin}-${content.length - 1}/${content.length}` };
  const headers = { etag, "accept-ranges": "bytes", "content-length": body.length };
  response.writeHead(begin > 0 ? 206 : 200, { ...headers, ...(begin > 0 && range) });
  if (cutAfterBytes === undefined) response.end(body);
  else response.write(body.subarray(0, cutAfterBytes), () => response.socket!.destroy());
}

function sendJson(
  response: ServerResponse,
  status: number,
  value: unknown,
  headers: Record<string, string> = {},
): void {
  response.writeHead(status, { "content-type": "application/json", ...headers }).end(JSON.stringify(value));
}

function notFound(response: ServerResponse, code: string): void {
  sendJson(response, 404, { error: "Not found" }, { "x-error-code": code });
}

function sha256(content: Uint8Array): string {
  return createHash("sha256").update(content).digest("hex");
}

function gitId(content: Uint8Array): string {
  return createHash("sha1").update(`blob ${content.length}\0`).update(content).digest("hex");
}

function listen(server: Server): Promise<void> {
  return new Promise((resolve) => void server.listen(0, "127.0.0.1", resolve));
}

function urlOf(server: Server): string {
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

function close(server: Server): Promise<void> {
  server.closeAllConnections();
  return new Promise((resolve) => void server.close(() => resolve()));
}
