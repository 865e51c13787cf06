// The body of a streamed answer: the steps of a run as server-sent events (the HTML standard's
// text/event-stream). It is pulled, so a client that reads slowly lets deltas merge behind it.

import type { ChunkWriter } from "./chat-response.ts";
import { errorEvent, KEEP_ALIVE, STREAM_END } from "./chat-response.ts";
import { CompletionAborted } from "./completion-stream.ts";
import type { ApiError } from "./errors.ts";
import type { Run, RunStep } from "./generation.ts";

export type EventStreamOptions = {
  run: Run;
  /** The run's first step, which was asked for already. */
  first: Promise<RunStep>;
  choiceCount: number;
  writer: ChunkWriter;
  includeUsage: boolean;
  /** After so long without an event a comment is sent. */
  keepAliveMs: number;
  /** What the client is told when the run throws. */
  toError: (error: unknown) => ApiError;
  /** The client has gone. */
  onLeave: () => void;
};

export class EventStream {
  readonly #options: EventStreamOptions;
  readonly #encoder = new TextEncoder();
  #first: Promise<RunStep> | null;
  #hasRoles = false;
  #isIdle = true;
  #isCancelled = false;
  #timer: ReturnType<typeof setInterval> | undefined;

  constructor(options: EventStreamOptions) {
    this.#options = options;
    this.#first = options.first;
  }

  open(): ReadableStream<Uint8Array<ArrayBuffer>> {
    return new ReadableStream({
      start: (controller) => {
        this.#timer = setInterval(() => this.#keepAlive(controller), this.#options.keepAliveMs);
      },
      pull: (controller) => this.#pull(controller),
      cancel: async () => {
        this.#isCancelled = true;
        clearInterval(this.#timer);
        this.#options.onLeave();
        await this.#options.run.return(undefined as never); // ends a run that waits to be asked
      },
    });
  }

  /** Enqueues the next events; a pull that enqueued nothing would not be followed by another. */
  async #pull(controller: ReadableStreamDefaultController<Uint8Array>): Promise<void> {
    let text = "";
    let isLast = false;
    try {
      while (text === "") {
        const step = await (this.#first ?? this.#options.run.next());
        this.#first = null;
        isLast = step.done === true;
        text = this.#render(step);
      }
    } catch (error) {
      if (error instanceof CompletionAborted && this.#isCancelled) return;
      isLast = true;
      text = errorEvent(this.#options.toError(error).body());
    }
    this.#isIdle = false;
    controller.enqueue(this.#encoder.encode(text));
    if (!isLast) return;
    clearInterval(this.#timer);
    controller.close();
  }

  #keepAlive(controller: ReadableStreamDefaultController<Uint8Array>): void {
    const hasRoom = (controller.desiredSize ?? 0) > 0;
    if (this.#isIdle && hasRoom) controller.enqueue(this.#encoder.encode(KEEP_ALIVE));
    this.#isIdle = true;
  }

  #render(step: RunStep): string {
    const { choiceCount, includeUsage, writer } = this.#options;
    const choices = [...Array(choiceCount).keys()];
    let text = "";
    if (!this.#hasRoles) text += choices.map((choice) => writer.role(choice)).join("");
    this.#hasRoles = true;
    if (step.done !== true) return text + step.value.map((delta) => writer.content(delta)).join("");
    const outcome = step.value;
    text += choices.map((choice) => writer.finish(choice, outcome)).join("");
    if (includeUsage) text += writer.usage(outcome);
    return text + STREAM_END;
  }
}
