// Deletes conversations from the cache, for good: notes what each one holds while its turns end, and on a delete has
// the engine remove the blocks, and the lineage the texts, that no other conversation holds. A delete that was broken
// off starts again: what a conversation holds is only struck out when it has gone.

import { SQLiteError } from "bun:sqlite";
import { conversationKey, type Holdings } from "./holdings.ts";
import type { Lineage } from "./lineage.ts";
import type { SubmitRequest } from "./protocol.ts";

/** Removes blocks from all tiers, with what continues them; blocks that running sequences use stay. */
export type RemoveBlocks = (ids: readonly string[]) => Promise<Record<string, number>>;

export interface ForgetterParts {
  readonly holdings: Holdings;
  readonly lineage: Pick<Lineage, "remember" | "forget">;
  /** Resolves with how many went, by tier. */
  readonly removeBlocks: RemoveBlocks;
}

/** A conversation's text with its ids; `answer` is the end of it that the client was given. */
export interface RememberedText {
  readonly text: string;
  readonly tokens: Int32Array;
  readonly answer: string;
}

/** What a choice left behind. */
export interface Remains {
  /** Chains of blocks, each from its first to its last. */
  readonly chains: readonly (readonly string[])[];
  /** Its text with the ids of it; null where the two do not agree. */
  readonly lineage: RememberedText | null;
}

export class Forgetter {
  #failureCount = 0;
  #isMakingRoom = false;

  constructor(readonly parts: ForgetterParts) {}

  /** What could not be noted, because the store failed: a delete will not find it. */
  get failureCount(): number {
    return this.#failureCount;
  }

  /** A choice has ended, in whatever way. Requests without a conversation are remembered, but held by nobody. */
  record({ salt, conversation }: SubmitRequest, { chains, lineage }: Remains): void {
    const segments = lineage === null ? [] : this.parts.lineage.remember(salt, lineage.text, lineage.tokens);
    if (conversation === null) return;
    try {
      this.parts.holdings.record(conversationKey(salt, conversation), { chains, segments });
    } catch (error) {
      if (!(error instanceof SQLiteError)) throw error;
      this.#failureCount++;
    }
    if (this.parts.holdings.isFull) void this.#makeRoom();
  }

  /** Resolves when everything has gone, with the blocks that went, by tier; {} for a conversation nobody knows. */
  async forget(salt: Uint8Array, conversation: string): Promise<Record<string, number>> {
    return await this.#forget(conversationKey(salt, conversation));
  }

  async #forget(key: Uint8Array): Promise<Record<string, number>> {
    const { holdings, lineage, removeBlocks } = this.parts;
    const removed: Record<string, number> = {};
    for (;;) {
      const { blocks, segments, usedAt } = holdings.heldAlone(key);
      const counts = blocks.length === 0 ? {} : await removeBlocks(blocks);
      for (const [tier, count] of Object.entries(counts)) removed[tier] = (removed[tier] ?? 0) + count;
      lineage.forget(segments);
      if (holdings.remove(key, usedAt)) return removed;
    }
  }

  /** What is not noted any more could never be deleted: so it is deleted now, the longest unused first. */
  async #makeRoom(): Promise<void> {
    if (this.#isMakingRoom) return;
    this.#isMakingRoom = true;
    try {
      while (this.parts.holdings.isFull) {
        const oldest = this.parts.holdings.leastRecentlyUsed();
        if (oldest === null) return;
        await this.#forget(oldest);
      }
    } catch (error) {
      if (!(error instanceof SQLiteError)) throw error;
      this.#failureCount++;
    } finally {
      this.#isMakingRoom = false;
    }
  }
}
