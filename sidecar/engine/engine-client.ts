// The main thread's end of the engine worker: typed messages out, events in, and a native wake-up, because a worker
// that waits for the device inside a native call does not see messages.

import { NativeLibrary, postTo } from "../native.ts";
import type { FinishReason } from "../protocol.ts";
import type { EngineEvent, EngineRequest } from "./request.ts";
import type { EngineReady, EngineWorkerOptions, FromEngine, ToEngine } from "./worker-messages.ts";

/** The engine could not start. */
export class EngineError extends Error {
  override name = "EngineError";
  constructor(
    message: string,
    /** The library cannot work on this machine at all. */
    readonly isUnsupported: boolean,
  ) {
    super(message);
  }
}

export interface EngineListeners {
  /** What one engine step brought about. */
  onEvents(events: readonly EngineEvent[]): void;
  onProgress(message: string): void;
  /** The engine had been ready, is gone and will not answer; the process should end. */
  onFailure(message: string): void;
}

export class EngineClient {
  readonly #worker: Worker;
  readonly #library: NativeLibrary;
  readonly #listeners: EngineListeners;
  readonly #answers = new Map<number, (stats: Readonly<Record<string, number>>) => void>();
  #nextNonce = 1;
  #deviceHandle = 0;
  #isReady = false;
  /** Rejects with EngineError. */
  readonly ready: Promise<EngineReady>;
  readonly #stopped: Promise<void>;
  #resolveReady!: (ready: EngineReady) => void;
  #rejectReady!: (error: Error) => void;
  #resolveStopped!: () => void;

  constructor(options: EngineWorkerOptions, listeners: EngineListeners) {
    this.#listeners = listeners;
    this.#library = new NativeLibrary(options.libraryPath);
    this.ready = new Promise((resolve, reject) => {
      this.#resolveReady = resolve;
      this.#rejectReady = reject;
    });
    this.#stopped = new Promise((resolve) => {
      this.#resolveStopped = resolve;
    });
    this.#worker = new Worker(new URL("./engine-worker.ts", import.meta.url).href);
    this.#worker.onmessage = (message: MessageEvent<FromEngine>) => this.#receive(message.data);
    this.#worker.onerror = (error) => this.#fail(new EngineError(error.message, false));
    this.#worker.postMessage(options);
  }

  submit(request: EngineRequest): void {
    this.#send({ type: "submit", request });
  }

  /** choice null: all of them. Ends with a finish event of that reason, unless it had ended already. */
  abort(request: number, choice: number | null, reason: FinishReason): void {
    this.#send({ type: "abort", request, choice, reason });
  }

  stats(): Promise<Readonly<Record<string, number>>> {
    const nonce = this.#nextNonce++;
    return new Promise((resolve) => {
      this.#answers.set(nonce, resolve);
      this.#send({ type: "stats", nonce });
    });
  }

  /** Removes blocks from all tiers; resolves with how many were in each. */
  forget(blockIds: readonly string[]): Promise<Readonly<Record<string, number>>> {
    const nonce = this.#nextNonce++;
    return new Promise((resolve) => {
      this.#answers.set(nonce, resolve);
      this.#send({ type: "forget", nonce, blockIds });
    });
  }

  /** Writes to disk what it admits, for at most `deadlineMs`, closes the device and ends the worker. */
  async stop(deadlineMs: number): Promise<void> {
    this.#send({ type: "stop", deadlineMs });
    // The worker closes the device when it sees the message: whoever still sends must not wake what is gone.
    this.#deviceHandle = 0;
    await this.#stopped;
    this.#worker.terminate();
  }

  #send(message: ToEngine): void {
    this.#worker.postMessage(message);
    if (this.#deviceHandle !== 0) postTo(this.#library, this.#deviceHandle);
  }

  #receive(message: FromEngine): void {
    switch (message.type) {
      case "events":
        this.#listeners.onEvents(message.events);
        break;
      case "ready":
        this.#deviceHandle = message.deviceHandle;
        this.#isReady = true;
        this.#resolveReady(message);
        break;
      case "progress":
        this.#listeners.onProgress(message.message);
        break;
      case "stats":
        this.#answer(message.nonce, message.stats);
        break;
      case "forgotten":
        this.#answer(message.nonce, message.blocks);
        break;
      case "failed":
        this.#fail(new EngineError(message.message, message.isUnsupported));
        break;
      case "stopped":
        this.#deviceHandle = 0;
        this.#resolveStopped();
        break;
    }
  }

  #answer(nonce: number, counts: Readonly<Record<string, number>>): void {
    this.#answers.get(nonce)?.(counts);
    this.#answers.delete(nonce);
  }

  #fail(error: EngineError): void {
    this.#deviceHandle = 0;
    this.#resolveStopped();
    if (this.#isReady) {
      this.#listeners.onFailure(error.message);
    } else {
      this.#worker.terminate();
      this.#rejectReady(error);
    }
  }
}
