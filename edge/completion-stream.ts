// One answer on its way from a sidecar: deltas that nobody has taken yet merge by choice, so that a
// slow client costs memory only for its text, and the end is checked against the sidecar's count.

import type { Delta, Done, TokenLogprob } from "../sidecar/protocol.ts";
import { sidecarLost } from "./errors.ts";

/** New text of one choice; "" with tokens while a character is incomplete. */
export type ChoiceDelta = {
  choice: number;
  text: string;
  tokenCount: number;
  logprobs: TokenLogprob[] | null;
};

export type CompletionEvent =
  | { type: "deltas"; deltas: ChoiceDelta[] }
  | { type: "done"; done: Done };

/** The consumer gave the answer up. */
export class CompletionAborted extends Error {
  override name = "CompletionAborted";
}

export class CompletionStream {
  #pending = new Map<number, ChoiceDelta>();
  #tokenCount = 0;
  #done: Done | null = null;
  #error: Error | null = null;
  #wake: (() => void) | null = null;
  readonly #onAbort: () => void;

  /** `onAbort` tells the sidecar; it is called at most once, and not after the end. */
  constructor(onAbort: () => void) {
    this.#onAbort = onAbort;
  }

  get hasEnded(): boolean {
    return this.#done !== null || this.#error !== null;
  }

  push([, choice, text, tokenCount, logprobs]: Delta): void {
    if (this.hasEnded) return;
    this.#tokenCount += tokenCount;
    const waiting = this.#pending.get(choice);
    if (waiting === undefined) {
      this.#pending.set(choice, { choice, text, tokenCount, logprobs });
    } else {
      waiting.text += text;
      waiting.tokenCount += tokenCount;
      if (logprobs !== null) (waiting.logprobs ??= []).push(...logprobs);
    }
    this.#wakeUp();
  }

  finish(done: Done): void {
    if (this.hasEnded) return;
    if (done.tokenCount === this.#tokenCount) this.#done = done;
    else {
      const counts = `${this.#tokenCount} of ${done.tokenCount} tokens arrived`;
      this.#error = sidecarLost(counts);
    }
    this.#wakeUp();
  }

  fail(error: Error): void {
    if (this.hasEnded) return;
    this.#error = error;
    this.#wakeUp();
  }

  /** Gives the answer up, at once; does nothing after its end. */
  abort(): void {
    if (this.hasEnded) return;
    this.#pending.clear();
    this.#error = new CompletionAborted("the answer was aborted");
    this.#onAbort();
    this.#wakeUp();
  }

  /** What came since the last call; waits when nothing did. Throws the error the stream ended with. */
  async next(): Promise<CompletionEvent> {
    while (this.#pending.size === 0 && !this.hasEnded) {
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    if (this.#pending.size > 0) {
      const deltas = [...this.#pending.values()];
      this.#pending.clear();
      return { type: "deltas", deltas };
    }
    if (this.#done !== null) return { type: "done", done: this.#done };
    throw this.#error!;
  }

  #wakeUp(): void {
    const wake = this.#wake;
    this.#wake = null;
    wake?.();
  }
}
