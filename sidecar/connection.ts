// One edge's WebSocket: its streams, and what waits to be sent to it. When the socket is full, the deltas of each
// stream merge until it drains; an edge that stays slow is cut off, so that memory stays bounded.

import type { ServerWebSocket } from "bun";
import type { Completion } from "./completion.ts";
import {
  type Delta,
  type Done,
  encodeFrame,
  FrameType,
  type SidecarFrame,
} from "./protocol.ts";

export interface ConnectionOptions {
  /** An edge whose socket stays full for so long is closed. */
  readonly slowEdgeTimeoutMs: number;
}

/** What Bun keeps with each socket. */
export interface SocketData {
  connection: Connection | null;
}

export class Connection {
  edgeName = "";
  isGreeted = false;
  isClosed = false;
  /** Requests in progress by the edge's stream number. */
  readonly streams = new Map<number, Completion>();
  #isFull = false;
  #slowTimer: ReturnType<typeof setTimeout> | null = null;
  /** Streams that ended while the socket was full; their done frames follow their last deltas. */
  #endedWhileFull: { completion: Completion; done: Done }[] = [];

  constructor(
    readonly socket: ServerWebSocket<SocketData>,
    readonly options: ConnectionOptions,
  ) {}

  /** Sends what the step brought: one delta frame, then the ends. */
  sendStep(ended: readonly { completion: Completion; done: Done }[]): void {
    for (const { completion } of ended) this.leave(completion);
    if (this.#isFull) {
      this.#endedWhileFull.push(...ended);
      return;
    }
    const deltas: Delta[] = [];
    for (const completion of this.streams.values()) deltas.push(...completion.takeDeltas());
    for (const { completion } of ended) deltas.push(...completion.takeDeltas());
    if (deltas.length > 0) this.send([FrameType.delta, deltas]);
    for (const { completion, done } of ended) this.send([FrameType.done, completion.stream, done]);
  }

  /** The stream has ended. Its number may have been given to another request since: that one stays. */
  leave(completion: Completion): void {
    if (this.streams.get(completion.stream) === completion) this.streams.delete(completion.stream);
  }

  /** Nothing waits here for the socket to drain. */
  get isFlushed(): boolean {
    return this.isClosed || !this.#isFull;
  }

  send(frame: SidecarFrame): void {
    if (this.isClosed) return;
    const sent = this.socket.send(encodeFrame(frame));
    // Bun: -1 is queued under back-pressure, 0 is dropped. A dropped frame would corrupt a stream.
    if (sent === -1) this.#markFull();
    if (sent === 0) this.#cutOff();
  }

  /** The socket has sent something; only when that was all of it, it has room again. */
  drained(): void {
    if (this.isClosed || this.socket.getBufferedAmount() > 0) return;
    this.#isFull = false;
    if (this.#slowTimer !== null) clearTimeout(this.#slowTimer);
    this.#slowTimer = null;
    this.sendStep(this.#endedWhileFull.splice(0));
  }

  close(code: number, reason: string): void {
    if (this.isClosed) return;
    this.markClosed();
    this.socket.close(code, reason.slice(0, 120));
  }

  markClosed(): void {
    this.isClosed = true;
    if (this.#slowTimer !== null) clearTimeout(this.#slowTimer);
  }

  #markFull(): void {
    this.#isFull = true;
    this.#slowTimer ??= setTimeout(() => this.#cutOff(), this.options.slowEdgeTimeoutMs);
  }

  /** At once: a close frame would wait behind what the edge does not read, and keep its memory. */
  #cutOff(): void {
    if (this.isClosed) return;
    this.markClosed();
    this.socket.terminate();
  }
}
