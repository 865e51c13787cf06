// One sidecar behind one WebSocket that carries all streams of this edge. It reconnects by itself,
// with backoff; streams that were on a broken connection fail with `sidecar_lost`, and whoever holds
// them decides whether to submit again (sidecar-pool.ts).

import {
  CloseCode,
  decodeSidecarFrame,
  type EdgeFrame,
  encodeFrame,
  FRAME_BYTES_MAX,
  FrameError,
  FrameType,
  type ModelInfo,
  PROTOCOL_VERSION,
  type SidecarFrame,
  type SubmitRequest,
} from "../sidecar/protocol.ts";
import { CompletionStream } from "./completion-stream.ts";
import { ApiError, sidecarError, sidecarLost } from "./errors.ts";
import type { Log } from "./log.ts";

export type SidecarTimings = {
  /** From dialling to the sidecar's hello. */
  connectTimeoutMs: number;
  backoffMinMs: number;
  backoffMaxMs: number;
  pingIntervalMs: number;
  /** A sidecar that sends nothing for so long is taken for dead. */
  silenceMaxMs: number;
  /** For answers to stats requests and forgets. */
  replyTimeoutMs: number;
};

export const DEFAULT_TIMINGS: SidecarTimings = {
  connectTimeoutMs: 5000,
  backoffMinMs: 100,
  backoffMaxMs: 5000,
  pingIntervalMs: 15_000,
  silenceMaxMs: 40_000,
  replyTimeoutMs: 10_000,
};

export type SidecarClientOptions = {
  url: string;
  secret: string;
  edgeName: string;
  log: Log;
  timings?: SidecarTimings;
  /** Runs after each hello, before the first submit; throws to refuse the sidecar. */
  onHello?: (client: SidecarClient) => Promise<void>;
  /** The sidecar has become ready, or is lost. */
  onChange?: () => void;
};

/** Requests that may wait in the socket; holds at least one frame of any size. */
const SEND_BUFFER_BYTES_MAX = 2 * FRAME_BYTES_MAX;

const REFUSED_SECRET = "it refused the connection (is KVASIR_SIDECAR_SECRET the sidecar's?)";

type Reply = { resolve: (value: unknown) => void; reject: (error: Error) => void };

export class SidecarClient {
  readonly url: string;
  /** As the sidecar calls itself; the last known one while it is away, "" before the first hello. */
  name = "";
  model: ModelInfo | null = null;
  readonly #options: SidecarClientOptions;
  readonly #timings: SidecarTimings;
  #socket: WebSocket | null = null;
  #state: "away" | "greeted" | "ready" = "away";
  #isClosed = false;
  #nextStream = 1;
  readonly #streams = new Map<number, CompletionStream>();
  readonly #replies = new Map<number, Reply>();
  #backoffMs: number;
  #lastFrameAtMs = 0;
  #lastReason = "";
  #connectTimer: ReturnType<typeof setTimeout> | undefined;
  #pingTimer: ReturnType<typeof setInterval> | undefined;

  constructor(options: SidecarClientOptions) {
    this.#options = options;
    this.url = options.url;
    this.#timings = options.timings ?? DEFAULT_TIMINGS;
    this.#backoffMs = this.#timings.backoffMinMs;
    this.#connect();
  }

  get isReady(): boolean {
    return this.#state === "ready";
  }

  /** Answers in progress on this connection. */
  get inFlight(): number {
    return this.#streams.size;
  }

  /** Throws ApiError when the sidecar is away or the request does not fit a frame. */
  submit(request: SubmitRequest): CompletionStream {
    if (this.#state !== "ready") throw sidecarLost("it is not connected");
    const id = this.#takeStreamId();
    const frame = encode([FrameType.submit, id, request]);
    if (frame.length > FRAME_BYTES_MAX) {
      const message = `The conversation is longer than ${FRAME_BYTES_MAX} bytes.`;
      throw new ApiError(413, "body_too_large", message, { param: "messages" });
    }
    if (this.#socket!.bufferedAmount + frame.length > SEND_BUFFER_BYTES_MAX) {
      throw sidecarError("queue_full", "The sidecar does not read as fast as requests come.", 1);
    }
    const stream = new CompletionStream(() => {
      this.#streams.delete(id);
      this.#send([FrameType.abort, id]);
    });
    this.#streams.set(id, stream);
    this.#socket!.send(frame);
    return stream;
  }

  /** Has the conversation's blocks removed from all tiers; resolves with their number by tier. */
  async forget(salt: Uint8Array, conversation: string): Promise<Record<string, number>> {
    const reply = this.#request((id) => [FrameType.forget, id, salt, conversation]);
    return (await reply) as Record<string, number>;
  }

  async stats(): Promise<Record<string, unknown>> {
    const reply = this.#request((id) => [FrameType.statsRequest, id]);
    return (await reply) as Record<string, unknown>;
  }

  /** Ends the connection for good; streams on it fail. */
  close(): void {
    this.#isClosed = true;
    clearTimeout(this.#connectTimer);
    this.#lose("the edge is shutting down", 1000);
  }

  #connect(): void {
    // Bun and Deno take headers here, which browsers do not; the types know only browsers.
    const init = { headers: { authorization: `Bearer ${this.#options.secret}` } };
    const socket = new WebSocket(this.url, init as unknown as string[]);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#nextStream = 1;
    this.#connectTimer = setTimeout(
      () => this.#lose("it did not answer in time", CloseCode.tooSlow),
      this.#timings.connectTimeoutMs,
    );
    socket.onopen = () => this.#send([FrameType.hello, PROTOCOL_VERSION, this.#options.edgeName]);
    socket.onmessage = ({ data }) => this.#receive(data as ArrayBuffer | string);
    let isRefused = false;
    socket.onclose = ({ code, reason }) => {
      const closed = isRefused ? REFUSED_SECRET : `it closed the connection (code ${code})`;
      this.#lose(reason === "" ? closed : reason, 1000);
    };
    // A close event follows. The status of a refusal is only here, in the words of Bun and of Deno alike.
    socket.onerror = (event) => {
      isRefused = "message" in event && /status code: 401/.test(String(event.message));
    };
  }

  /** The connection is gone, or is given up: fail what was on it and dial again after a pause. */
  #lose(reason: string, closeCode: number): void {
    if (this.#socket === null) return;
    const socket = this.#socket;
    this.#socket = null;
    const wasReady = this.#state === "ready";
    this.#state = "away";
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close(closeCode, reason.replaceAll(/[^ -~]/g, "?").slice(0, 120));
    clearTimeout(this.#connectTimer);
    clearInterval(this.#pingTimer);
    if (!this.#isClosed && (wasReady || reason !== this.#lastReason)) {
      this.#options.log.warn({ url: this.url, reason }, "sidecar away");
      this.#lastReason = reason;
    }
    for (const stream of this.#streams.values()) stream.fail(sidecarLost(reason));
    for (const reply of this.#replies.values()) reply.reject(sidecarLost(reason));
    this.#streams.clear();
    this.#replies.clear();
    if (this.#isClosed) return;
    // Half of the pause is random, so that many edges do not come back in one moment.
    const pauseMs = this.#backoffMs * (0.5 + Math.random() / 2);
    this.#backoffMs = Math.min(this.#backoffMs * 2, this.#timings.backoffMaxMs);
    this.#connectTimer = setTimeout(() => this.#connect(), pauseMs);
    if (wasReady) this.#options.onChange?.();
  }

  #receive(data: ArrayBuffer | string): void {
    this.#lastFrameAtMs = Date.now();
    try {
      if (typeof data === "string") throw new FrameError("frames are binary");
      this.#apply(decodeSidecarFrame(new Uint8Array(data)));
    } catch (error) {
      if (!(error instanceof FrameError)) throw error;
      this.#lose(`it sent a malformed frame: ${error.message}`, CloseCode.malformedFrame);
    }
  }

  #apply(frame: SidecarFrame): void {
    if (this.#state === "away" && frame[0] !== FrameType.hello) {
      this.#lose("its first frame was not hello", CloseCode.outOfOrder);
      return;
    }
    switch (frame[0]) {
      case FrameType.hello:
        void this.#greet(frame[1], frame[2], frame[3]);
        break;
      case FrameType.delta:
        for (const delta of frame[1]) this.#stream(delta[0])?.push(delta);
        break;
      case FrameType.done:
        this.#stream(frame[1])?.finish(frame[2]);
        this.#streams.delete(frame[1]);
        break;
      case FrameType.error:
        this.#fail(frame[1], sidecarError(frame[2], frame[3], frame[4]));
        break;
      case FrameType.stats:
      case FrameType.forgotten:
        this.#replies.get(frame[1])?.resolve(frame[2]);
        this.#replies.delete(frame[1]);
        break;
      case FrameType.pong:
        break;
    }
  }

  async #greet(version: number, name: string, model: ModelInfo): Promise<void> {
    if (this.#state !== "away") return this.#lose("it said hello twice", CloseCode.outOfOrder);
    if (version !== PROTOCOL_VERSION) {
      const reason = `it speaks protocol ${version}, this edge ${PROTOCOL_VERSION}: update the older one`;
      return this.#lose(reason, CloseCode.wrongVersion);
    }
    clearTimeout(this.#connectTimer);
    const socket = this.#socket;
    this.name = name;
    this.model = model;
    this.#state = "greeted";
    this.#pingTimer = setInterval(() => this.#ping(), this.#timings.pingIntervalMs);
    try {
      await this.#options.onHello?.(this);
    } catch (error) {
      if (this.#socket === socket) this.#lose((error as Error).message, CloseCode.outOfOrder);
      return;
    }
    if (this.#socket !== socket) return; // lost meanwhile
    this.#state = "ready";
    this.#backoffMs = this.#timings.backoffMinMs;
    this.#options.log.info({ url: this.url, sidecar: name, model: model.id }, "sidecar ready");
    this.#options.onChange?.();
  }

  #ping(): void {
    const silenceMs = Date.now() - this.#lastFrameAtMs;
    if (silenceMs > this.#timings.silenceMaxMs) {
      this.#lose(`it was silent for ${silenceMs} ms`, CloseCode.tooSlow);
    } else {
      this.#send([FrameType.ping, 0]);
    }
  }

  /** Frames for streams that were aborted are late; those for streams never opened are a fault. */
  #stream(id: number): CompletionStream | undefined {
    if (id >= this.#nextStream) throw new FrameError(`stream ${id} was never opened`);
    return this.#streams.get(id);
  }

  #fail(id: number, error: ApiError): void {
    this.#stream(id)?.fail(error);
    this.#streams.delete(id);
    this.#replies.get(id)?.reject(error);
    this.#replies.delete(id);
  }

  async #request(frame: (id: number) => EdgeFrame): Promise<unknown> {
    if (this.#state !== "ready" && this.#state !== "greeted") throw sidecarLost("it is not connected");
    const id = this.#takeStreamId();
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.#replies.set(id, { resolve, reject });
    this.#send(frame(id));
    const timer = setTimeout(
      () => reject(sidecarLost("it did not reply in time")),
      this.#timings.replyTimeoutMs,
    );
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
      this.#replies.delete(id);
    }
  }

  #takeStreamId(): number {
    return this.#nextStream++; // no connection lives for 2^32 requests
  }

  #send(frame: EdgeFrame): void {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(encode(frame));
  }
}

function encode(frame: EdgeFrame): Uint8Array<ArrayBuffer> {
  return encodeFrame(frame) as Uint8Array<ArrayBuffer>; // the packer never uses shared memory
}
