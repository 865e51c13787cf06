// Finds stop strings in a stream of text pieces, also where they cross token borders: text that could still become a
// stop string is held back until the next piece decides. Of several, the one that is complete first ends the text (if
// two are at once, the longer), as if the text came character by character: token borders make no difference.

export interface StopScan {
  /** Text that may be sent. */
  readonly text: string;
  /** A stop string was found; it and what follows are not part of the answer. */
  readonly isStopped: boolean;
}

export class StopScanner {
  #held = "";

  constructor(readonly stops: readonly string[]) {}

  push(piece: string): StopScan {
    if (this.stops.length === 0) return { text: piece, isStopped: false };
    const text = this.#held + piece;
    const at = startOfFirstComplete(text, this.stops);
    if (at >= 0) {
      this.#held = "";
      return { text: text.slice(0, at), isStopped: true };
    }
    const heldLength = longestSuffixThatBegins(text, this.stops);
    this.#held = text.slice(text.length - heldLength);
    return { text: text.slice(0, text.length - heldLength), isStopped: false };
  }

  /** The generation ended without a stop string: what was held back is part of the answer. */
  flush(): string {
    const text = this.#held;
    this.#held = "";
    return text;
  }
}

/** -1 when there is none. */
function startOfFirstComplete(text: string, stops: readonly string[]): number {
  let start = -1;
  let end = Infinity;
  for (const stop of stops) {
    const at = text.indexOf(stop);
    if (at < 0 || at + stop.length > end) continue;
    start = at + stop.length < end ? at : Math.min(at, start);
    end = at + stop.length;
  }
  return start;
}

function longestSuffixThatBegins(text: string, stops: readonly string[]): number {
  let longest = 0;
  for (const stop of stops) {
    for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
      if (text.endsWith(stop.slice(0, length))) longest = length;
    }
  }
  return longest;
}
