// Why blocks that once were cached are not any more, so that a miss can be counted with its reason. Bounded: the
// reasons of the longest lost are forgotten, and such a block is plainly absent.

import type { BlockId } from "./block-hash.ts";

/** Reasons for which prompt tokens are computed and not taken from the cache. */
export const MISS_REASONS = [
  "absent",
  "evicted",
  "expired",
  "corrupt",
  "io",
  "timeout",
  "fingerprint",
  "collision",
  "truncated_restart",
  "template_rewrote",
  "recompute_cheaper",
  "deleted",
  "no_host_room",
] as const;
export type MissReason = (typeof MISS_REASONS)[number];

/** Blocks of another fingerprint that an earlier process left. */
export interface FormerBlocks {
  /** Of that fingerprint. */
  readonly digest: Uint8Array;
  readonly ids: readonly BlockId[];
}

export class LostBlocks {
  /** As many as the disk tier has slots at most, and they go with the process. */
  #former: { readonly digest: Uint8Array; readonly ids: Set<BlockId> } | null = null;
  readonly #reasons = new Map<BlockId, MissReason>();
  readonly counts = new Map<MissReason, number>();

  constructor(readonly capacity: number) {}

  /** Blocks whose ids nobody can tell any more: an earlier process had them. */
  count(reason: MissReason, blocks: number): void {
    if (blocks > 0) this.counts.set(reason, (this.counts.get(reason) ?? 0) + blocks);
  }

  note(id: BlockId, reason: MissReason): void {
    this.count(reason, 1);
    this.#reasons.delete(id);
    this.#reasons.set(id, reason);
    if (this.#reasons.size <= this.capacity) return;
    this.#reasons.delete(this.#reasons.keys().next().value!);
  }

  /** Of the fingerprint under which blocks of noteFormer() are named; null: there were none. */
  get formerDigest(): Uint8Array | null {
    return this.#former?.digest ?? null;
  }

  /** Each block counts once, wherever it lay. Those of one fingerprint are known by name, others are only counted. */
  noteFormer({ digest, ids }: FormerBlocks): void {
    this.#former ??= { digest, ids: new Set() };
    const former = this.#former;
    if (Buffer.compare(former.digest, digest) !== 0) return this.count("fingerprint", ids.length);
    const before = former.ids.size;
    for (const id of ids) former.ids.add(id);
    this.count("fingerprint", former.ids.size - before);
  }

  /** A block of noteFormer(). */
  isFormer(id: BlockId): boolean {
    return this.#former?.ids.has(id) === true;
  }

  /** The block is cached again. */
  found(id: BlockId): void {
    this.#reasons.delete(id);
  }

  reason(id: BlockId): MissReason {
    return this.#reasons.get(id) ?? "absent";
  }
}
