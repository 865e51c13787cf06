// A sidecar's server in the test's process, over an engine that only remembers, and edges to talk to it.

import { expect } from "bun:test";
import type { EngineEvent, EngineRequest, FinishEvent } from "../../sidecar/engine/request.ts";
import { Holdings } from "../../sidecar/holdings.ts";
import { Lineage } from "../../sidecar/lineage.ts";
import type { ChatTemplate } from "../../sidecar/model/chat-template.ts";
import { PromptBuilder } from "../../sidecar/prompt.ts";
import {
  decodeSidecarFrame, type EdgeFrame, encodeFrame, type FinishReason, FrameType, type ModelInfo, PROTOCOL_VERSION,
  type SidecarFrame,
} from "../../sidecar/protocol.ts";
import { SidecarServer, type SidecarServerOptions } from "../../sidecar/server.ts";
import { cacheReport } from "./cache-report.ts";
import { byteToken, FAKE_SPECIALS, FAKE_TOKENIZER_VOCAB, fakeTokenizer } from "./fake-tokenizer.ts";
import { submitRequest } from "./submit-request.ts";
import { Watch } from "./watch.ts";

export const SECRET = "a secret of the test";
export const MODEL: ModelInfo = {
  id: "tiny", maxModelLen: 64, vocabSize: FAKE_TOKENIZER_VOCAB, blockTokens: 8, backend: "fake", created: 1,
};
const cleanups: (() => unknown)[] = [];

/** What must be undone after a test, last thing first. */
export function onCleanup(cleanup: () => unknown): void {
  cleanups.push(cleanup);
}

/** To be called after each test. */
export async function cleanUp(): Promise<void> {
  for (const cleanup of cleanups.splice(0).toReversed()) await cleanup();
}

/** An engine that does nothing but remember. */
export class FakeEngine {
  readonly requests: EngineRequest[] = [];
  readonly aborts: { request: number; choice: number | null; reason: string }[] = [];
  readonly forgotten: string[][] = [];

  constructor(readonly watch: Watch) {}

  submit(request: EngineRequest): void {
    this.requests.push(request);
    this.watch.notify();
  }

  abort(request: number, choice: number | null, reason: string): void {
    this.aborts.push({ request, choice, reason });
    this.watch.notify();
  }

  async forget(ids: readonly string[]): Promise<Record<string, number>> {
    this.forgotten.push(ids.toSorted());
    this.watch.notify();
    return { gpu: ids.length, disk: 1 };
  }

  async stats(): Promise<Record<string, number>> {
    return { steps: 3 };
  }
}

/** A message "wait" is not encoded before the test opens this. */
export class Gate {
  readonly #open = Promise.withResolvers<void>();
  open = () => this.#open.resolve();

  get passed(): Promise<void> {
    return this.#open.promise;
  }
}

export function startServer(changes: Partial<SidecarServerOptions> = {}) {
  const watch = new Watch();
  const engine = new FakeEngine(watch);
  const gate = new Gate();
  const tokenizer = fakeTokenizer();
  const encode = tokenizer.encodeAsync.bind(tokenizer);
  tokenizer.encodeAsync = async (text) => {
    if (text.includes("wait")) await gate.passed;
    return encode(text);
  };
  const lineage = new Lineage({
    path: ":memory:", tokenizerId: "bytes", specialTokens: FAKE_SPECIALS, maxSegments: 100, maxSegmentTokens: 10_000,
  });
  const holdings = new Holdings({ path: ":memory:", maxItems: 1000 });
  const template = {
    render(messages: { content: string }[]) {
      if (messages.some(({ content }) => content === "refused")) throw new Error("no such role");
      return `<start>${messages.map(({ content }) => content).join("")}`;
    },
  } as unknown as ChatTemplate;
  const limits = { modelId: MODEL.id, maxModelLen: MODEL.maxModelLen, vocabSize: MODEL.vocabSize };
  const prompts = new PromptBuilder(template, tokenizer, lineage, limits);
  const server = new SidecarServer(
    { engine, prompts, tokenizer, lineage, holdings },
    {
      name: "sidecar-test", host: "127.0.0.1", port: 0, secret: SECRET, model: MODEL, maxRequests: 8,
      slowEdgeTimeoutMs: 60_000, cacheTtlMs: null, say() {}, ...changes,
    },
  );
  onCleanup(() => server.drain(0));
  return { server, engine, watch, gate, lineage, holdings };
}

export class Edge {
  readonly frames: SidecarFrame[] = [];
  closed: { code: number; reason: string } | null = null;
  wasOpen = false;
  readonly socket: WebSocket;
  readonly #watch = new Watch();

  constructor(url: string, headers: Record<string, string> = { authorization: `Bearer ${SECRET}` }) {
    this.socket = new WebSocket(url, { headers } as unknown as string[]);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => {
      this.frames.push(decodeSidecarFrame(new Uint8Array(data as ArrayBuffer)));
      this.#watch.notify();
    };
    this.socket.onclose = ({ code, reason }) => {
      this.closed = { code, reason };
      this.#watch.notify();
    };
    this.socket.onopen = () => {
      this.wasOpen = true;
      this.#watch.notify();
    };
    onCleanup(() => this.socket.close());
  }

  async until(condition: () => boolean): Promise<this> {
    await this.#watch.until(condition);
    return this;
  }

  async opened(): Promise<this> {
    return this.until(() => this.socket.readyState === WebSocket.OPEN);
  }

  send(...frames: EdgeFrame[]): void {
    for (const frame of frames) this.sendBytes(encodeFrame(frame));
  }

  sendBytes(bytes: Uint8Array): void {
    this.socket.send(bytes as Uint8Array<ArrayBuffer>);
  }

  async frame(type: number): Promise<SidecarFrame> {
    await this.until(() => this.frames.some((frame) => frame[0] === type));
    return this.frames.find((frame) => frame[0] === type)!;
  }

  async closing(): Promise<{ code: number; reason: string }> {
    await this.until(() => this.closed !== null);
    return this.closed!;
  }

  hasPong(nonce: number): boolean {
    return this.frames.some(([type, each]) => type === FrameType.pong && each === nonce);
  }

  /** Proves that it is still served. */
  async expectAlive(nonce: number): Promise<void> {
    this.send([FrameType.ping, nonce]);
    await this.until(() => this.closed !== null || this.hasPong(nonce));
    expect(this.closed).toBe(null);
  }
}

export const HELLO: EdgeFrame = [FrameType.hello, PROTOCOL_VERSION, "edge-test"];

export async function greeted(server: SidecarServer): Promise<Edge> {
  const edge = await new Edge(server.url).opened();
  edge.send(HELLO);
  await edge.frame(FrameType.hello);
  return edge;
}

export function submit(stream: number, changes: Parameters<typeof submitRequest>[0] = {}): EdgeFrame {
  return [FrameType.submit, stream, submitRequest(changes)];
}

export function tokenEvent(request: number, text: string, choice = 0): EngineEvent[] {
  return [...Buffer.from(text)].map((byte) => ({
    type: "token", request, choice, token: byteToken(byte), logprob: -1, top: [],
  }));
}

export function finishEvent(
  request: EngineRequest,
  completionTokens: number,
  { choice = 0, reason = "length" as FinishReason, blockIds = [] as string[] } = {},
): FinishEvent {
  return {
    type: "finish", request: request.id, choice, reason, blockIds,
    usage: { promptTokens: request.tokens.length, completionTokens, cachedTokens: { gpu: 0, host: 0, disk: 0 } },
    timings: { queueMs: 0, loadMs: 0, prefillMs: 0, ttftMs: 0, totalMs: 0 },
    cache: cacheReport(),
    missReasons: {},
    tokens: request.tokens,
  };
}
