// The sidecar's face: a WebSocket server that speaks protocol.ts. Each edge has one connection; each request is a
// stream on it. Frames that break the rules close their connection and touch nobody else.

import type { Server, ServerWebSocket } from "bun";
import { timingSafeEqual } from "node:crypto";
import { Completion } from "./completion.ts";
import { Connection, type SocketData } from "./connection.ts";
import type { EngineClient } from "./engine/engine-client.ts";
import { type EngineEvent, type FailEvent, nowMs } from "./engine/request.ts";
import type { Lineage } from "./lineage.ts";
import type { Tokenizer } from "./model/tokenizer.ts";
import { engineSampling, type PromptBuilder, RequestError } from "./prompt.ts";
import {
  CloseCode,
  decodeEdgeFrame,
  type Done,
  type EdgeFrame,
  FRAME_BYTES_MAX,
  FrameError,
  FrameType,
  type ModelInfo,
  PROTOCOL_VERSION,
  type SubmitRequest,
} from "./protocol.ts";

export interface SidecarServerOptions {
  readonly name: string;
  readonly host: string;
  /** 0: any free one. */
  readonly port: number;
  readonly secret: string;
  readonly model: ModelInfo;
  /** Requests of all edges that may be in progress, waiting ones included. */
  readonly maxRequests: number;
  readonly slowEdgeTimeoutMs: number;
}

/** What the server works with. */
export interface SidecarParts {
  readonly engine: Pick<EngineClient, "submit" | "abort" | "stats">;
  readonly prompts: PromptBuilder;
  readonly tokenizer: Tokenizer;
  readonly lineage: Lineage;
}

/** A request in progress and whom it belongs to. */
interface Active {
  readonly connection: Connection;
  readonly completion: Completion;
}

/** Bun drops frames beyond this and says so; we close then. One step's frame always fits. */
const DROP_BYTES = 64 * 1024 * 1024;

export class SidecarServer {
  readonly #active = new Map<number, Active>();
  /** Streams whose prompt is being rendered and encoded. */
  #preparing = 0;
  #nextRequest = 1;
  #isDraining = false;
  #onIdle: (() => void) | null = null;
  readonly #connections = new Set<Connection>();
  readonly #server: Server<SocketData>;

  constructor(
    readonly parts: SidecarParts,
    readonly options: SidecarServerOptions,
  ) {
    this.#server = Bun.serve<SocketData>({
      hostname: options.host,
      port: options.port,
      fetch: (request, server) => this.#upgrade(request, server),
      websocket: {
        maxPayloadLength: FRAME_BYTES_MAX,
        backpressureLimit: DROP_BYTES,
        perMessageDeflate: false,
        idleTimeout: 120,
        open: (socket) => this.#open(socket),
        message: (socket, message) => this.#message(socket, message),
        drain: (socket) => {
          socket.data.connection?.drained();
          this.#checkIdle();
        },
        close: (socket) => this.#close(socket),
      },
    });
  }

  get url(): string {
    const { host } = this.options;
    return `ws://${host.includes(":") ? `[${host}]` : host}:${this.#server.port}`;
  }

  /** Called with the events of one engine step. */
  applyEvents(events: readonly EngineEvent[]): void {
    const ended = new Map<Connection, { completion: Completion; done: Done }[]>();
    const touched = new Set<Connection>();
    for (const event of events) {
      const active = this.#active.get(event.request);
      if (active === undefined) continue; // Its edge left; the abort is on its way.
      touched.add(active.connection);
      if (event.type === "fail") {
        this.#fail(event, active);
        continue;
      }
      const { stoppedChoice, isDone } = active.completion.apply(event);
      if (stoppedChoice !== null) this.parts.engine.abort(event.request, stoppedChoice, "stop");
      if (isDone) {
        const list = ended.get(active.connection) ?? [];
        list.push(this.#end(event.request, active));
        ended.set(active.connection, list);
      }
    }
    for (const connection of touched) connection.sendStep(ended.get(connection) ?? []);
    this.#checkIdle();
  }

  /** Takes no new requests, waits for those in progress at most `timeoutMs`, then closes every connection. */
  async drain(timeoutMs: number): Promise<void> {
    this.#isDraining = true;
    const idle = new Promise<void>((resolve) => {
      this.#onIdle = resolve;
    });
    this.#checkIdle();
    const timer = Promise.withResolvers<void>();
    const timeout = setTimeout(timer.resolve, timeoutMs);
    await Promise.race([idle, timer.promise]);
    clearTimeout(timeout);
    for (const connection of this.#connections) {
      connection.close(CloseCode.shuttingDown, "the sidecar is shutting down");
    }
    await this.#server.stop(true);
  }

  #upgrade(request: Request, server: Server<SocketData>): Response | undefined {
    // A browser always sends Origin; an edge never does.
    if (request.headers.has("origin")) return new Response("no browsers here", { status: 403 });
    const authorization = request.headers.get("authorization") ?? "";
    if (!isSameSecret(authorization, `Bearer ${this.options.secret}`)) {
      return new Response("wrong or missing secret", { status: 401 });
    }
    if (server.upgrade(request, { data: { connection: null } })) return undefined;
    return new Response("this is a WebSocket endpoint", { status: 426 });
  }

  #open(socket: ServerWebSocket<SocketData>): void {
    const connection = new Connection(socket, this.options);
    socket.data.connection = connection;
    this.#connections.add(connection);
  }

  #close(socket: ServerWebSocket<SocketData>): void {
    const connection = socket.data.connection!;
    connection.markClosed();
    this.#connections.delete(connection);
    for (const [id, active] of this.#active) {
      if (active.connection === connection) this.#abort(id);
    }
    this.#checkIdle();
  }

  #message(socket: ServerWebSocket<SocketData>, message: string | Buffer): void {
    const connection = socket.data.connection!;
    if (connection.isClosed) return;
    try {
      if (typeof message === "string") throw new FrameError("frames are binary");
      this.#dispatch(connection, decodeEdgeFrame(message));
    } catch (error) {
      if (!(error instanceof FrameError)) throw error;
      connection.close(CloseCode.malformedFrame, error.message);
    }
  }

  #dispatch(connection: Connection, frame: EdgeFrame): void {
    if (!connection.isGreeted && frame[0] !== FrameType.hello) {
      connection.close(CloseCode.outOfOrder, "the first frame must be hello");
      return;
    }
    switch (frame[0]) {
      case FrameType.hello:
        this.#greet(connection, frame[1], frame[2]);
        break;
      case FrameType.submit:
        this.#submit(connection, frame[1], frame[2]);
        break;
      case FrameType.abort:
        this.#abortStream(connection, frame[1]);
        break;
      case FrameType.statsRequest:
        void this.#sendStats(connection, frame[1]);
        break;
      case FrameType.ping:
        connection.send([FrameType.pong, frame[1]]);
        break;
      case FrameType.forget:
        connection.send([FrameType.forgotten, frame[1], {}]);
        break;
    }
  }

  #greet(connection: Connection, version: number, edgeName: string): void {
    if (connection.isGreeted) {
      connection.close(CloseCode.outOfOrder, "hello came twice");
      return;
    }
    if (version !== PROTOCOL_VERSION) {
      const reason = `the sidecar speaks protocol ${PROTOCOL_VERSION}, the edge ${version}`;
      connection.close(CloseCode.wrongVersion, reason);
      return;
    }
    connection.isGreeted = true;
    connection.edgeName = edgeName;
    const { name, model } = this.options;
    connection.send([FrameType.hello, PROTOCOL_VERSION, name, model]);
  }

  #submit(connection: Connection, stream: number, request: SubmitRequest): void {
    if (connection.streams.has(stream)) {
      connection.close(CloseCode.outOfOrder, `stream ${stream} is in use`);
      return;
    }
    // msgpack's bytes are a view of the frame, which does not outlive this turn.
    const ownRequest = { ...request, salt: new Uint8Array(request.salt) };
    const completion = new Completion(stream, ownRequest, this.parts.tokenizer);
    connection.streams.set(stream, completion);
    const id = this.#nextRequest++;
    this.#preparing++;
    this.#start(id, { connection, completion }, nowMs())
      .catch((error: unknown) => this.#refuse(id, { connection, completion }, error))
      .finally(() => {
        this.#preparing--;
        this.#checkIdle();
      });
  }

  async #start(id: number, active: Active, receivedAtMs: number): Promise<void> {
    if (this.#isDraining) throw new RequestError("shutting_down", "the sidecar is shutting down");
    if (this.#active.size + this.#preparing > this.options.maxRequests) {
      throw new RequestError("queue_full", `${this.options.maxRequests} requests are in progress already`, 1);
    }
    const { request } = active.completion;
    const prompt = await this.parts.prompts.build(request);
    if (!isWanted(active)) return;
    active.completion.promptText = prompt.text;
    this.#active.set(id, active);
    this.parts.engine.submit({
      id,
      tokens: prompt.tokens,
      salt: request.salt,
      sampling: engineSampling(request.sampling),
      choiceCount: request.sampling.n,
      maxTokens: prompt.maxTokens,
      receivedAtMs,
      deadlineAtMs: receivedAtMs + request.deadlineMs,
    });
  }

  #refuse(id: number, active: Active, error: unknown): void {
    this.#active.delete(id);
    if (!isWanted(active)) return;
    const { connection, completion } = active;
    connection.leave(completion);
    const { code, retryAfterS } =
      error instanceof RequestError ? error : { code: "internal" as const, retryAfterS: null };
    const message = error instanceof Error ? error.message : String(error);
    connection.send([FrameType.error, completion.stream, code, message, retryAfterS]);
  }

  #abortStream(connection: Connection, stream: number): void {
    connection.streams.delete(stream);
    for (const [id, active] of this.#active) {
      if (active.connection === connection && active.completion.stream === stream) this.#abort(id);
    }
    this.#checkIdle();
  }

  #abort(id: number): void {
    this.#active.delete(id);
    this.parts.engine.abort(id, null, "abort");
  }

  #end(id: number, { completion }: Active): { completion: Completion; done: Done } {
    this.#active.delete(id);
    for (const { text, tokens } of completion.lineages()) {
      this.parts.lineage.remember(completion.request.salt, text, tokens);
    }
    return { completion, done: completion.done() };
  }

  #fail(event: FailEvent, { connection, completion }: Active): void {
    this.#active.delete(event.request);
    connection.leave(completion);
    const { code, message, retryAfterS } = event;
    connection.send([FrameType.error, completion.stream, code, message, retryAfterS]);
  }

  async #sendStats(connection: Connection, stream: number): Promise<void> {
    const engine = await this.parts.engine.stats();
    const server = {
      activeRequests: this.#active.size,
      connections: this.#connections.size,
      lineageFailures: this.parts.lineage.failureCount,
    };
    connection.send([FrameType.stats, stream, { ...engine, ...server }]);
  }

  #checkIdle(): void {
    if (this.#onIdle === null || this.#active.size > 0 || this.#preparing > 0) return;
    // What an edge has not read yet would be lost with its connection.
    for (const connection of this.#connections) if (!connection.isFlushed) return;
    this.#onIdle();
  }
}

/** False when the edge aborted the stream, or left, while the prompt was prepared. */
function isWanted({ connection, completion }: Active): boolean {
  return !connection.isClosed && connection.streams.get(completion.stream) === completion;
}

/** Compares in constant time, so that the secret cannot be guessed byte by byte. */
function isSameSecret(given: string, expected: string): boolean {
  const digest = (text: string) => new Bun.CryptoHasher("sha256").update(text).digest();
  return timingSafeEqual(digest(given), digest(expected));
}
