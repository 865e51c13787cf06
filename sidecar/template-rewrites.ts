// Templates that write earlier turns anew (dropping old reasoning, dates, whatever): the conversation's messages are
// what they were, but their text is not, so what was cached of it is not found. It costs hits, never meaning; here it
// is counted.

import type { ChatMessage } from "./protocol.ts";

/** The text that a list of messages had. */
interface Known {
  readonly textLength: number;
  readonly textHash: bigint;
  readonly tokenCount: number;
}

export class TemplateRewrites {
  /** By the hash of the messages, the answer included; the longest unused first. */
  readonly #known = new Map<bigint, Known>();

  constructor(readonly capacity: number) {}

  /** A turn has ended: `messages` and this answer have this text, in so many tokens. */
  note(salt: Uint8Array, messages: readonly ChatMessage[], answer: string, text: string, tokenCount: number): void {
    let key = Bun.hash.xxHash64(salt);
    for (const message of [...messages, { role: "assistant", content: answer } as const]) key = chained(key, message);
    this.#known.delete(key);
    this.#known.set(key, { textLength: text.length, textHash: Bun.hash.xxHash64(text), tokenCount });
    if (this.#known.size > this.capacity) this.#known.delete(this.#known.keys().next().value!);
  }

  /**
   * Tokens of an earlier turn of these messages that the template now writes otherwise. `foundTokens`: those from the
   * start of the text that are as they were.
   */
  count(salt: Uint8Array, messages: readonly ChatMessage[], text: string, foundTokens: number): number {
    let key = Bun.hash.xxHash64(salt);
    let last: Known | undefined;
    for (const message of messages) {
      key = chained(key, message);
      last = this.#known.get(key) ?? last;
    }
    if (last === undefined) return 0;
    const isSame = Bun.hash.xxHash64(text.slice(0, last.textLength)) === last.textHash;
    return isSame ? 0 : Math.max(0, last.tokenCount - foundTokens);
  }
}

function chained(key: bigint, { role, content, name }: ChatMessage): bigint {
  return Bun.hash.xxHash64(JSON.stringify([role, content, name ?? null]), key);
}
