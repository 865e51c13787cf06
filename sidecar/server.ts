// The sidecar's face: a WebSocket server that speaks protocol.ts. Each edge has one connection; each request is a
// stream on it. Frames that break the rules close their connection and touch nobody else.

import type { Server, ServerWebSocket } from "bun";
import { timingSafeEqual } from "node:crypto";
import { type Active, ActiveRequests, isOf } from "./active-requests.ts";
import { Completion } from "./completion.ts";
import { Connection, type SocketData } from "./connection.ts";
import type { EngineClient } from "./engine/engine-client.ts";
import { type BegunEvent, type EngineEvent, type EngineRequest, type FailEvent, nowMs } from "./engine/request.ts";
import { Forgetter, type RemoveBlocks } from "./forgetter.ts";
import type { Holdings } from "./holdings.ts";
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
import { RareMessage } from "./rare-message.ts";

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
  /** Idle time after which blocks go, where a request does not say; null: never. */
  readonly cacheTtlMs: number | null;
  /** Told what the person who runs it should know. */
  readonly say: (message: string) => void;
}

/** What the server works with. */
export interface SidecarParts {
  /** Without `forget` the blocks of deleted conversations stay until they are evicted. */
  readonly engine: Pick<EngineClient, "submit" | "abort" | "stats"> & { readonly forget?: RemoveBlocks };
  readonly prompts: PromptBuilder;
  readonly tokenizer: Tokenizer;
  readonly lineage: Lineage;
  readonly holdings: Holdings;
}

/** Bun drops frames beyond this and says so; we close then. One step's frame always fits. */
const DROP_BYTES = 64 * 1024 * 1024;
const REFUSAL_MESSAGE_PAUSE_MS = 60_000;

export class SidecarServer {
  readonly #requests = new ActiveRequests();
  /** Streams whose prompt is being rendered and encoded. */
  #preparing = 0;
  #forgetting = 0;
  #nextRequest = 1;
  #isDraining = false;
  #onIdle: (() => void) | null = null;
  readonly #connections = new Set<Connection>();
  readonly #forgetter: Forgetter;
  readonly #refusals: RareMessage;
  readonly #server: Server<SocketData>;

  constructor(
    readonly parts: SidecarParts,
    readonly options: SidecarServerOptions,
  ) {
    const { engine, holdings, lineage } = parts;
    this.#refusals = new RareMessage(options.say, REFUSAL_MESSAGE_PAUSE_MS);
    const removeBlocks: RemoveBlocks = async (ids) => (await engine.forget?.(ids)) ?? {};
    this.#forgetter = new Forgetter({ holdings, lineage, removeBlocks });
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
      const active = this.#requests.wanted(event.request);
      if (event.type === "begun") {
        this.#noteBegun(event, active?.completion ?? this.#requests.leaving(event.request));
        continue;
      }
      if (active === undefined) {
        this.#applyUnwanted(event);
        continue;
      }
      touched.add(active.connection);
      if (event.type === "fail") {
        this.#fail(event, active);
        continue;
      }
      const { stoppedChoice, isDone } = active.completion.apply(event);
      if (stoppedChoice !== null) this.parts.engine.abort(event.request, stoppedChoice, "stop");
      if (isDone) {
        const list = ended.get(active.connection) ?? [];
        list.push(this.#end(active));
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
      // Here, not when it has closed: the engine is to say what they leave before it is told to stop.
      for (const active of this.#requests.of(connection)) this.#abort(active);
      connection.close(CloseCode.shuttingDown, "the sidecar is shutting down");
    }
    await this.#server.stop(true);
  }

  #upgrade(request: Request, server: Server<SocketData>): Response | undefined {
    // A browser always sends Origin; an edge never does.
    if (request.headers.has("origin")) return new Response("no browsers here", { status: 403 });
    const authorization = request.headers.get("authorization") ?? "";
    if (!isSameSecret(authorization, `Bearer ${this.options.secret}`)) {
      this.#sayRefused(authorization, server.requestIP(request)?.address);
      return new Response("wrong or missing secret", { status: 401 });
    }
    if (server.upgrade(request, { data: { connection: null } })) return undefined;
    return new Response("this is a WebSocket endpoint", { status: 426 });
  }

  /** An edge always sends a secret; who sends none is something else. */
  #sayRefused(authorization: string, address = "an unknown address"): void {
    if (authorization === "") return;
    const message = `refused an edge at ${address}: wrong secret (its KVASIR_SIDECAR_SECRET is not this sidecar's)`;
    this.#refusals.report(message, nowMs());
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
    for (const active of this.#requests.of(connection)) this.#abort(active);
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
        void this.#forget(connection, frame[1], new Uint8Array(frame[2]), frame[3]);
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
    const active = { id, connection, completion };
    this.#preparing++;
    this.#start(active, nowMs())
      .catch((error: unknown) => this.#refuse(active, error))
      .finally(() => {
        this.#preparing--;
        this.#checkIdle();
      });
  }

  async #start(active: Active, receivedAtMs: number): Promise<void> {
    if (this.#isDraining) throw new RequestError("shutting_down", "the sidecar is shutting down");
    if (this.#requests.count + this.#preparing > this.options.maxRequests) {
      throw new RequestError("queue_full", `${this.options.maxRequests} requests are in progress already`, 1);
    }
    const { request } = active.completion;
    const prompt = await this.parts.prompts.build(request);
    if (!isWanted(active)) return;
    active.completion.promptText = prompt.text;
    this.#requests.add(active);
    this.parts.engine.submit({
      id: active.id,
      tokens: prompt.tokens,
      salt: request.salt,
      sampling: engineSampling(request.sampling),
      choiceCount: request.sampling.n,
      maxTokens: prompt.maxTokens,
      isTruncating: request.truncation === "auto",
      rewrittenTokens: prompt.rewrittenTokens,
      keep: keepOf(request, this.options.cacheTtlMs),
      isHeld: request.conversation !== null,
      receivedAtMs,
      deadlineAtMs: receivedAtMs + request.deadlineMs,
    });
  }

  #refuse(active: Active, error: unknown): void {
    this.#requests.end(active.id);
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
    const mine = this.#requests.of(connection).filter(({ completion }) => completion.stream === stream);
    for (const active of mine) this.#abort(active);
    this.#checkIdle();
  }

  #abort(active: Active): void {
    this.#requests.giveUp(active);
    this.parts.engine.abort(active.id, null, "abort");
  }

  #end({ id, completion }: Active): { completion: Completion; done: Done } {
    this.#requests.end(id);
    for (const remains of completion.remains()) {
      this.#forgetter.record(completion.request, remains);
      const { lineage } = remains;
      if (lineage === null) continue;
      this.parts.prompts.noteEnd(completion.request, lineage.answer, lineage.text, lineage.tokens);
    }
    return { completion, done: completion.done() };
  }

  /** A process that dies before the end leaves blocks that a delete must find. */
  #noteBegun({ blockIds }: BegunEvent, completion: Completion | undefined): void {
    if (completion !== undefined) this.#forgetter.record(completion.request, { chains: [blockIds], lineage: null });
  }

  /** The ends of requests that were given up still say which blocks stay in the cache. */
  #applyUnwanted(event: Exclude<EngineEvent, BegunEvent>): void {
    const completion = this.#requests.leaving(event.request);
    if (completion === undefined || event.type === "token") return;
    if (event.type === "finish" && !completion.apply(event).isDone) return;
    this.#recordBlocks(completion, event.type === "fail" ? event.blockIds : []);
    this.#requests.end(event.request);
  }

  /** Of a request that was given up or failed: its text is not whole, so only the blocks count. */
  #recordBlocks(completion: Completion, failedBlockIds: readonly string[] = []): void {
    const chains = Array.from(completion.remains(), (remains) => remains.chains[0]!);
    // Those of a failed request are several chains in one list: each block stands for itself.
    chains.push(...failedBlockIds.map((id) => [id]));
    this.#forgetter.record(completion.request, { chains, lineage: null });
  }

  /** Ends the conversation's turns in progress, then removes all it holds. */
  async #forget(connection: Connection, stream: number, salt: Uint8Array, conversation: string): Promise<void> {
    this.#forgetting++;
    try {
      for (const each of this.#connections) this.#dropTurns(each, salt, conversation);
      await this.#requests.whenLeft(salt, conversation);
      const blocks = await this.#forgetter.forget(salt, conversation);
      connection.send([FrameType.forgotten, stream, blocks]);
    } catch (error) {
      // Without the acknowledgement the edge asks again.
      connection.send([FrameType.error, stream, "internal", (error as Error).message, null]);
    } finally {
      this.#forgetting--;
      this.#checkIdle();
    }
  }

  #dropTurns(connection: Connection, salt: Uint8Array, conversation: string): void {
    const running = this.#requests.of(connection);
    for (const completion of connection.streams.values()) {
      if (!isOf(completion.request, salt, conversation)) continue;
      connection.leave(completion);
      const message = "The conversation was deleted while it was being answered.";
      connection.send([FrameType.error, completion.stream, "conversation_deleted", message, null]);
      const active = running.find((each) => each.completion === completion);
      if (active !== undefined) this.#abort(active); // else it is being prepared, and will not be wanted
    }
  }

  #fail(event: FailEvent, { connection, completion }: Active): void {
    this.#requests.end(event.request);
    this.#recordBlocks(completion, event.blockIds);
    connection.leave(completion);
    const { code, message, retryAfterS } = event;
    connection.send([FrameType.error, completion.stream, code, message, retryAfterS]);
  }

  async #sendStats(connection: Connection, stream: number): Promise<void> {
    const engine = await this.parts.engine.stats();
    const server = {
      activeRequests: this.#requests.count,
      connections: this.#connections.size,
      lineageFailures: this.parts.lineage.failureCount,
      holdingsFailures: this.#forgetter.failureCount,
    };
    connection.send([FrameType.stats, stream, { ...engine, ...server }]);
  }

  #checkIdle(): void {
    if (this.#onIdle === null || this.#requests.count + this.#preparing + this.#forgetting > 0) return;
    // What an edge has not read yet would be lost with its connection.
    for (const connection of this.#connections) if (!connection.isFlushed) return;
    this.#onIdle();
  }
}

function keepOf({ cacheTtlS, priority }: SubmitRequest, defaultTtlMs: number | null): EngineRequest["keep"] {
  const ttlMs = cacheTtlS === null ? defaultTtlMs : cacheTtlS * 1000;
  return ttlMs === null ? { priority } : { priority, ttlMs };
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
