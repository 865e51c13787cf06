// How much of a prompt is cached, and under which view. Without overflow that is the longest chain of blocks from the
// prompt's beginning. Once the window has overflowed, only the blocks of the present view count; where one of them was
// lost whose computation saw more than the view still shows, what is left cannot be made exact again, and the view
// restarts: its tokens are computed afresh, under names of their own.

import type { BlockChain } from "./block-chain.ts";
import type { CachedBlock } from "./cached-block.ts";
import type { MissReason } from "./lost-blocks.ts";
import type { LostBlocks } from "./lost-blocks.ts";
import type { LongestChild, PrefixIndex } from "./prefix-index.ts";

export interface PrefixMatch {
  /** Names the sequence's blocks from here on. */
  readonly chain: BlockChain;
  /** Drops behind the view in which the sequence goes on. */
  readonly drops: number;
  /** Full blocks, in the view's order. */
  readonly blocks: readonly CachedBlock[];
  /** A block that begins with the tokens that follow. */
  readonly partial: LongestChild | null;
  /** Cached tokens, which are positions [0, length) of the view. */
  readonly length: number;
  /** Tokens of [0, limit) that are still to be computed. */
  readonly missing: number;
  readonly isRestart: boolean;
}

/**
 * Tokens of the view that a match must at least use: where something was dropped that the chain had computed, what
 * follows up to that drop was computed with it, and cannot be computed again.
 */
export function minLength({ chain: { rule, firstDrops }, drops }: PrefixMatch): number {
  return drops === firstDrops ? 0 : rule.dropPoint(drops) - drops * rule.dropTokens;
}

interface Wanted {
  readonly tokens: ArrayLike<number>;
  readonly limit: number;
  readonly isUsable: (block: CachedBlock) => boolean;
}

/** Restarted views that are looked for; a conversation restarted longer ago restarts once more. */
const RESTARTS_TRIED = 4;

export class PrefixMatcher {
  constructor(
    readonly index: PrefixIndex,
    readonly lost: LostBlocks,
  ) {}

  /** The match of blocks that `isUsable` which leaves the fewest of tokens[0, limit) to compute. */
  match(
    chain: BlockChain,
    tokens: ArrayLike<number>,
    limit: number,
    isUsable: (block: CachedBlock) => boolean = () => true,
  ): PrefixMatch {
    const lastDrops = chain.rule.dropsBefore(limit);
    const prompt = { tokens, limit, isUsable };
    let best = this.#matchView(chain, prompt, 0);
    const consider = (match: PrefixMatch): void => {
      if (match.missing < best.missing) best = match;
    };
    for (let drops = lastDrops; drops > 0; drops--) consider(this.#matchLaterView(chain, prompt, drops));
    for (let drops = lastDrops; drops > Math.max(0, lastDrops - RESTARTS_TRIED); drops--) {
      const restarted = chain.restartAt(drops);
      for (let later = lastDrops; later > drops; later--) {
        consider(this.#matchLaterView(restarted, prompt, later));
      }
      consider(this.#matchView(restarted, prompt, drops));
    }
    return best;
  }

  /** Why each token that the match leaves to compute has to be, counted. */
  missReasons(match: PrefixMatch, tokens: ArrayLike<number>, limit: number): Map<MissReason, number> {
    const reasons = new Map<MissReason, number>();
    const { rule, blockTokens } = match.chain;
    for (let at = match.length; rule.fullLength(at, match.drops) < limit; ) {
      const place = Math.floor(at / blockTokens);
      const full = rule.fullIndex(place, match.drops);
      const end = Math.min((full + 1) * blockTokens, limit) - (full - place) * blockTokens;
      const isFull = (full + 1) * blockTokens <= limit;
      let reason: MissReason = isFull ? this.#reasonOf(match.chain, full, tokens) : "absent";
      if (match.isRestart) reason = "truncated_restart";
      reasons.set(reason, (reasons.get(reason) ?? 0) + end - at);
      at = end;
    }
    return reasons;
  }

  #reasonOf(chain: BlockChain, index: number, tokens: ArrayLike<number>): MissReason {
    const begin = index * chain.blockTokens;
    const name = chain.name(index, tokens);
    const found = this.index.find(name, tokens, begin, begin + chain.blockTokens);
    if (found === "collision") return found;
    const reason = this.lost.reason(name.id);
    if (reason !== "absent" || chain.former === null) return reason;
    return this.lost.isFormer(chain.former.id(index, tokens)) ? "fingerprint" : "absent";
  }

  /** A view with something dropped from it: exact only where its last drop has happened. */
  #matchLaterView(chain: BlockChain, prompt: Wanted, drops: number): PrefixMatch {
    const match = this.#matchView(chain, prompt, drops);
    return match.length >= minLength(match) ? match : { ...match, missing: Infinity };
  }

  #matchView(chain: BlockChain, { tokens, limit, isUsable }: Wanted, drops: number): PrefixMatch {
    const { rule, blockTokens } = chain;
    const blocks: CachedBlock[] = [];
    // A view is full at its next drop: beyond that it shows other blocks.
    const end = Math.min(limit, rule.dropPoint(drops + 1));
    let full = rule.fullIndex(0, drops);
    while ((full + 1) * blockTokens <= end) {
      const begin = full * blockTokens;
      const block = this.index.find(chain.name(full, tokens), tokens, begin, begin + blockTokens);
      if (block === null || block === "collision" || !isUsable(block)) break;
      blocks.push(block);
      full = rule.fullIndex(blocks.length, drops);
    }
    const begin = full * blockTokens;
    const partialEnd = Math.min(end, begin + blockTokens);
    const partial =
      partialEnd > begin
        ? this.index.longestChild(chain.parent(full, tokens), tokens, begin, partialEnd, isUsable)
        : null;
    const length = blocks.length * blockTokens + (partial?.length ?? 0);
    return {
      chain,
      drops,
      blocks,
      partial,
      length,
      missing: limit - drops * rule.dropTokens - length,
      isRestart: chain.firstDrops > 0 && drops === chain.firstDrops && blocks.length <= rule.keepBlocks,
    };
  }
}
