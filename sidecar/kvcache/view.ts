// Which tokens of a conversation the model still sees once its context window is full. When the view holds a whole
// window, the oldest blocks after the kept prefix leave it and the rest moves down (CachedAttention, USENIX ATC '24,
// 3.4). The points at which that happens depend on the position in the whole token sequence alone, never on a
// request or on what is cached: so the same tokens always mean the same blocks.

import { assert } from "../assert.ts";

export interface TruncationOptions {
  readonly blockTokens: number;
  /** Longest view in tokens; what is not a whole block of it stays unused. */
  readonly maxTokens: number;
  /** Blocks at the start that never leave: attention sink, start of the system prompt. The paper keeps 0. */
  readonly keepBlocks: number;
  /** Share of the window that leaves at each drop; the paper takes 0.5. */
  readonly ratio: number;
}

export class TruncationRule {
  readonly blockTokens: number;
  readonly windowBlocks: number;
  readonly keepBlocks: number;
  /** Blocks that leave at each drop: floor(window * ratio), at least one. */
  readonly dropBlocks: number;

  /** Throws when a drop would have to take blocks that are kept. */
  constructor({ blockTokens, maxTokens, keepBlocks, ratio }: TruncationOptions) {
    this.blockTokens = blockTokens;
    this.windowBlocks = Math.floor(maxTokens / blockTokens);
    this.keepBlocks = keepBlocks;
    this.dropBlocks = Math.max(1, Math.floor(this.windowBlocks * ratio));
    assert(keepBlocks + this.dropBlocks <= this.windowBlocks, "a drop takes more than the window holds");
  }

  /** True when a window of `maxTokens` can drop anything beside what is kept. */
  static fits({ blockTokens, maxTokens, keepBlocks, ratio }: TruncationOptions): boolean {
    const windowBlocks = Math.floor(maxTokens / blockTokens);
    return keepBlocks + Math.max(1, Math.floor(windowBlocks * ratio)) <= windowBlocks;
  }

  get windowTokens(): number {
    return this.windowBlocks * this.blockTokens;
  }

  get dropTokens(): number {
    return this.dropBlocks * this.blockTokens;
  }

  /** Drops that have happened before the token at `index` of the whole sequence is computed. */
  dropsBefore(index: number): number {
    if (index < this.windowTokens) return 0;
    return Math.floor((index - this.windowTokens) / this.dropTokens) + 1;
  }

  /** Tokens at which drop number `drop` (1, 2, ...) happens: the view is full then. */
  dropPoint(drop: number): number {
    return this.windowTokens + (drop - 1) * this.dropTokens;
  }

  /** Block of the whole sequence at place `index` of a view with so many drops behind it. */
  fullIndex(index: number, drops: number): number {
    return index < this.keepBlocks ? index : index + drops * this.dropBlocks;
  }

  /** Tokens of the whole sequence up to the end of a view of so many tokens. */
  fullLength(viewLength: number, drops: number): number {
    return viewLength <= this.keepBlocks * this.blockTokens ? viewLength : viewLength + drops * this.dropTokens;
  }

  /** The first window of what is left of the tokens after so many drops. */
  viewTokens(tokens: ArrayLike<number>, drops: number): Int32Array {
    const kept = Math.min(tokens.length, this.keepBlocks * this.blockTokens);
    const dropped = drops * this.dropTokens;
    const view = new Int32Array(Math.min(tokens.length - dropped, this.windowTokens));
    for (let i = 0; i < view.length; i++) view[i] = tokens[i < kept ? i : i + dropped]!;
    return view;
  }
}
