// A sidecar that speaks the protocol and does what a test's script says: answers, stalls, sends wrong
// counts, breaks off. What the edge sent is kept for the test to look at.

import type { ServerWebSocket } from "bun";
import type {
  Done,
  EdgeFrame,
  ErrorCode,
  SidecarFrame,
  SubmitRequest,
  TokenLogprob,
} from "../../sidecar/protocol.ts";
import { decodeEdgeFrame, encodeFrame, FrameType, PROTOCOL_VERSION } from "../../sidecar/protocol.ts";
import { cacheReport } from "./cache-report.ts";

export const FAKE_SECRET = "fake-sidecar-secret";
export const FAKE_MODEL = "tiny";

type Socket = ServerWebSocket<undefined>;
type Script = (stream: FakeStream) => unknown;

export type FakeSidecarOptions = {
  name?: string;
  modelId?: string;
  maxModelLen?: number;
  /** What happens on each submit; `echo` when there is none. */
  script?: Script;
};

/** One submitted request, in the hands of a script. */
export class FakeStream {
  tokenCount = 0;
  readonly #aborted = Promise.withResolvers<void>();

  constructor(
    readonly id: number,
    readonly request: SubmitRequest,
    readonly sidecar: FakeSidecar,
    readonly socket: Socket,
  ) {}

  /** Resolves when the edge has aborted it. */
  get aborted(): Promise<void> {
    return this.#aborted.promise;
  }

  markAborted(): void {
    this.#aborted.resolve();
  }

  delta(text: string, choice = 0, tokenCount = 1, logprobs: TokenLogprob[] | null = null): void {
    this.tokenCount += tokenCount;
    this.send([FrameType.delta, [[this.id, choice, text, tokenCount, logprobs]]]);
  }

  done(changes: Partial<Done> = {}): void {
    const promptTokens = this.request.messages.length * 10;
    this.send([
      FrameType.done,
      this.id,
      {
        usage: {
          promptTokens,
          completionTokens: this.tokenCount,
          cachedTokens: { gpu: promptTokens - 5, host: 2, disk: 1 },
        },
        timings: { queueMs: 0.5, loadMs: 0, prefillMs: 2, ttftMs: 3, totalMs: 9 },
        cache: cacheReport(),
        finishReasons: Array.from({ length: this.request.sampling.n }, () => "stop" as const),
        tokenCount: this.tokenCount,
        missReasons: { absent: 2 },
        ...changes,
      },
    ]);
  }

  error(code: ErrorCode, message: string, retryAfterS: number | null = null): void {
    this.send([FrameType.error, this.id, code, message, retryAfterS]);
  }

  send(frame: SidecarFrame): void {
    this.socket.send(encodeFrame(frame));
  }

  /** Breaks the connection off. */
  cut(): void {
    this.socket.terminate();
  }
}

/** Says the last message again, word by word, in each choice. */
export function echo(stream: FakeStream): void {
  const words = stream.request.messages.at(-1)!.content.match(/\s*\S+/g) ?? [];
  for (let choice = 0; choice < stream.request.sampling.n; choice++) {
    for (const word of words) stream.delta(word, choice);
  }
  stream.done();
}

export class FakeSidecar {
  readonly submits: SubmitRequest[] = [];
  /** All frames in the order they came, by type. */
  readonly frames: EdgeFrame[] = [];
  readonly forgotten: string[] = [];
  stats: Record<string, unknown> = { steps: 3 };
  script: Script;
  readonly #options: FakeSidecarOptions;
  #port = 0;
  #server: ReturnType<FakeSidecar["listen"]> | null = null;
  readonly #sockets = new Map<Socket, Map<number, FakeStream>>();
  readonly #waiters = new Set<() => void>();

  constructor(options: FakeSidecarOptions = {}) {
    this.#options = options;
    this.script = options.script ?? echo;
    this.start();
  }

  get url(): string {
    return `ws://127.0.0.1:${this.#port}`;
  }

  get name(): string {
    return this.#options.name ?? "fake";
  }

  get connectionCount(): number {
    return this.#sockets.size;
  }

  /** Listens again, on the port it had. */
  start(): void {
    this.#server = this.listen();
    this.#port = this.#server.port!;
  }

  /** Goes away as a crash would. */
  async stop(): Promise<void> {
    const server = this.#server;
    this.#server = null;
    for (const socket of this.#sockets.keys()) socket.terminate();
    await server?.stop(true);
  }

  /** Resolves when `condition` holds; looked at after each frame and each connection. */
  async until(condition: () => boolean): Promise<void> {
    while (!condition()) {
      await new Promise<void>((resolve) => {
        this.#waiters.add(resolve);
      });
    }
  }

  listen() {
    return Bun.serve<undefined>({
      hostname: "127.0.0.1",
      port: this.#port,
      fetch: (request, server) => {
        const isAllowed = request.headers.get("authorization") === `Bearer ${FAKE_SECRET}`;
        if (!isAllowed) return new Response("wrong secret", { status: 401 });
        return server.upgrade(request, { data: undefined }) ? undefined : new Response("", { status: 426 });
      },
      websocket: {
        open: (socket) => {
          this.#sockets.set(socket, new Map());
        },
        close: (socket) => {
          this.#sockets.delete(socket);
          this.#wake();
        },
        message: (socket, message) => {
          this.#apply(socket, decodeEdgeFrame(message as Buffer));
          this.#wake();
        },
      },
    });
  }

  #apply(socket: Socket, frame: EdgeFrame): void {
    this.frames.push(frame);
    const send = (answer: SidecarFrame) => socket.send(encodeFrame(answer));
    switch (frame[0]) {
      case FrameType.hello:
        send([FrameType.hello, PROTOCOL_VERSION, this.name, this.#model()]);
        break;
      case FrameType.submit: {
        const request = { ...frame[2], salt: new Uint8Array(frame[2].salt) };
        const stream = new FakeStream(frame[1], request, this, socket);
        this.submits.push(request);
        this.#sockets.get(socket)!.set(frame[1], stream);
        void this.script(stream);
        break;
      }
      case FrameType.abort:
        this.#sockets.get(socket)!.get(frame[1])?.markAborted();
        break;
      case FrameType.forget:
        this.forgotten.push(frame[3]);
        send([FrameType.forgotten, frame[1], { gpu: 1 }]);
        break;
      case FrameType.statsRequest:
        send([FrameType.stats, frame[1], this.stats]);
        break;
      case FrameType.ping:
        send([FrameType.pong, frame[1]]);
        break;
    }
  }

  #model() {
    return {
      id: this.#options.modelId ?? FAKE_MODEL,
      maxModelLen: this.#options.maxModelLen ?? 2048,
      vocabSize: 1000,
      blockTokens: 64,
      backend: "fake",
      created: 1_700_000_000,
    };
  }

  #wake(): void {
    for (const waiter of this.#waiters) waiter();
    this.#waiters.clear();
  }
}
