// Opening a sequence on what is cached: which part to take and from where, which part to compute anew because that is
// faster, and the loads that bring what is not yet in gpu memory.

import type { BlockMoves } from "./block-moves.ts";
import type { BlockNumber } from "./block-pool.ts";
import { ABSENT, type CachedBlock, isHostReady } from "./cached-block.ts";
import type { BlockCost, Choice, CostModel } from "./cost-model.ts";
import type { BlockTable, CachedTokens, OpenedSequence, QueuedPrompt } from "./opened-sequence.ts";
import type { LayerTransfer } from "./layer-transfer.ts";
import type { MissReason } from "./lost-blocks.ts";
import { minLength, type PrefixMatch, type PrefixMatcher } from "./prefix-match.ts";
import type { Residency } from "./residency.ts";

export interface OpenerOptions {
  readonly blockTokens: number;
  readonly blockBytes: number;
}

/** When it is asked, and whether others want the device too. */
interface Now {
  readonly nowMs: number;
  readonly isShared: boolean;
}

/** The cached blocks that a sequence will use: full ones in order, then perhaps the beginning of one. */
interface Plan {
  readonly match: PrefixMatch;
  readonly blocks: readonly CachedBlock[];
  readonly partial: CachedBlock | null;
  /** Tokens that they hold. */
  readonly length: number;
  readonly predictedLoadMs: number | null;
  readonly predictedRecomputeMs: number | null;
  /** Why the rest of the match is not used; null: all of it is. */
  readonly cutReason: MissReason | null;
}

/** A read from disk may take so many times what was expected before the tokens are computed instead. */
const PATIENCE = 4;
const PATIENCE_MS_MIN = 250;
const PATIENCE_MS_UNKNOWN = 10_000;

export class PromptOpener {
  constructor(
    readonly residency: Residency,
    readonly moves: BlockMoves,
    readonly matcher: PrefixMatcher,
    readonly costs: CostModel,
    readonly options: OpenerOptions,
  ) {}

  open(prompt: QueuedPrompt, room: number, now: Now): OpenedSequence | "no-room" | "reading" {
    const match = this.#verifiedMatch(prompt);
    const plan = this.#plan(match, prompt, now);
    if (plan === "reading") return plan;
    const { rule } = match.chain;
    const viewRoom = Math.min(room - match.drops * rule.dropTokens, rule.windowTokens);
    const blockCount = Math.max(Math.ceil(viewRoom / this.options.blockTokens), plan.blocks.length);
    const needed = blockCount - plan.blocks.filter((block) => this.#isInUse(block)).length;
    const { availableCount } = this.residency.gpu;
    if (needed > availableCount) return "no-room";
    // The block that a partial one is copied from must be held meanwhile: where that is too much, do without.
    if (!this.#clearGpu(plan, blockCount, now.nowMs)) return "no-room";
    const isTight = plan.partial !== null && plan.partial.gpu !== ABSENT && needed === availableCount;
    return this.#take(isTight ? withoutPartial(plan, this.options) : plan, prompt, blockCount, now.nowMs);
  }

  /** Exclusive tiers: what has to leave the gpu for this sequence goes down first. */
  #clearGpu(plan: Plan, blockCount: number, nowMs: number): boolean {
    const { gpu, tiers } = this.residency;
    const used = usedBlocks(plan);
    const resident = used.filter((block) => block.gpu !== ABSENT);
    const below = used.filter((block) => block.gpu === ABSENT);
    // What it will use itself is not in the way.
    for (const block of resident) gpu.retain(block.gpu);
    for (const block of below) tiers.host!.pool.retain(block.host);
    const isClear = this.moves.clearGpu(blockCount - plan.blocks.length + below.length, nowMs, true);
    for (const block of resident) gpu.release(block.gpu);
    for (const block of below) tiers.host!.pool.release(block.host);
    return isClear;
  }

  #isInUse({ gpu }: CachedBlock): boolean {
    return gpu !== ABSENT && this.residency.gpu.refCount(gpu) > 0;
  }

  /** Adopted host copies are checked on first use; what is not whole is lost, and the match is shorter. */
  #verifiedMatch({ chain, tokens, limit }: QueuedPrompt): PrefixMatch {
    for (;;) {
      const match = this.matcher.match(chain, tokens, limit);
      const used = match.partial === null ? match.blocks : [...match.blocks, match.partial.block];
      const isWhole = used.every((block) => block.gpu !== ABSENT || block.host === ABSENT ||
        block.hostState !== "unverified" || this.residency.verify(block));
      if (isWhole) return match;
    }
  }

  #plan(match: PrefixMatch, prompt: QueuedPrompt, now: Now): Plan | "reading" {
    const candidates = match.partial === null ? match.blocks : [...match.blocks, match.partial.block];
    const choice = this.costs.choose(candidates.map((block) => this.#costOf(block)), match.missing, now.isShared);
    const isCut = choice.blockCount < candidates.length && this.#mayCut(match, choice.blockCount);
    const count = isCut ? choice.blockCount : candidates.length;
    const missing = this.#firstNotHere(candidates, count, prompt, now.nowMs);
    if (missing === "reading") return missing;
    if (missing === null) return this.#planOf(match, count, isCut ? "recompute_cheaper" : null, choice);
    if (this.#mayCut(match, missing.index)) return this.#planOf(match, missing.index, missing.reason, choice);
    // A view cannot go on without this block: with what is here, another one may.
    const { chain, tokens, limit } = prompt;
    const here = this.matcher.match(chain, tokens, limit, isHere);
    return this.#planOf(here, here.blocks.length + (here.partial === null ? 0 : 1), null, choice);
  }

  /** The match is still one when it ends after so many blocks. */
  #mayCut(match: PrefixMatch, count: number): boolean {
    return count * this.options.blockTokens >= minLength(match);
  }

  /** Uses the first `count` of the full blocks and the partial one behind them. */
  #planOf(match: PrefixMatch, count: number, cutReason: MissReason | null, choice: Choice): Plan {
    const partial = count > match.blocks.length && canCopy(match.partial!.block) ? match.partial : null;
    const blocks = match.blocks.slice(0, count);
    const { predictedLoadMs, predictedRecomputeMs } = choice;
    return {
      match,
      blocks,
      partial: partial?.block ?? null,
      length: blocks.length * this.options.blockTokens + (partial?.length ?? 0),
      predictedLoadMs,
      predictedRecomputeMs,
      cutReason,
    };
  }

  #costOf(block: CachedBlock): BlockCost {
    const { blockBytes } = this.options;
    if (block.gpu !== ABSENT) return { hostBytes: 0, diskBytes: 0 };
    if (isHostReady(block)) return { hostBytes: blockBytes, diskBytes: 0 };
    return { hostBytes: 0, diskBytes: blockBytes };
  }

  /** Of the first `count`, the one that stays away; "reading" while those that are on their way may be waited for. */
  #firstNotHere(
    blocks: readonly CachedBlock[],
    count: number,
    prompt: QueuedPrompt,
    nowMs: number,
  ): { index: number; reason: MissReason } | "reading" | null {
    const away = blocks.slice(0, count).filter((block) => !isHere(block));
    if (away.length === 0) return null;
    const index = blocks.indexOf(away[0]!);
    prompt.fetchDeadlineMs ??= nowMs + this.#patienceMs(away.length);
    if (nowMs > prompt.fetchDeadlineMs) return { index, reason: "timeout" };
    const isOn = this.residency.tiers.disk?.isOn(nowMs) === true;
    for (const block of away) {
      if (block.host !== ABSENT) prompt.fetched.add(block); // on its way already
      else if (isOn && this.moves.read(block, nowMs)) prompt.fetched.add(block);
    }
    return prompt.fetched.has(away[0]!) ? "reading" : { index, reason: isOn ? "no_host_room" : "io" };
  }

  #patienceMs(blockCount: number): number {
    const expected = this.moves.readRate.expectedMs(blockCount * this.options.blockBytes);
    return expected === null ? PATIENCE_MS_UNKNOWN : Math.max(PATIENCE_MS_MIN, expected * PATIENCE);
  }

  #take(plan: Plan, prompt: QueuedPrompt, blockCount: number, nowMs: number): OpenedSequence {
    const { match } = plan;
    const table: BlockTable = {
      chain: match.chain, blocks: [], committedCount: plan.blocks.length, drops: match.drops, keep: prompt.keep,
    };
    const cached = this.#countTiers(plan, prompt);
    const loads = new Set<LayerTransfer>();
    // All that is here is held before anything is taken, or it might be the victim.
    for (const { gpu } of usedBlocks(plan)) if (gpu !== ABSENT) this.residency.gpu.retain(gpu);
    const toLoad = new LoadList();
    for (const block of plan.blocks) {
      if (block.gpuLoad !== null) loads.add(block.gpuLoad);
      if (block.gpu === ABSENT) toLoad.add(block, this.residency.takeGpu()!, true);
      table.blocks.push(block.gpu === ABSENT ? toLoad.lastGpu : block.gpu);
    }
    if (plan.partial !== null) table.blocks.push(this.#takePartial(plan.partial, plan, toLoad));
    if (toLoad.blocks.length > 0) {
      loads.add(this.moves.load(toLoad.blocks, toLoad.gpuBlocks, toLoad.owned, nowMs));
    }
    while (table.blocks.length < blockCount) table.blocks.push(this.residency.takeGpu()!);
    const used = usedBlocks(plan);
    for (const block of used) block.useCount++;
    this.residency.policy.touch(used, nowMs, prompt.keep);
    this.residency.touched(used, nowMs);
    return {
      table,
      length: plan.length,
      cached,
      loads: [...loads],
      loadedBytes: toLoad.blocks.length * this.options.blockBytes,
      predictedLoadMs: plan.predictedLoadMs,
      predictedRecomputeMs: plan.predictedRecomputeMs,
      missReasons: this.#missReasons(plan, prompt),
    };
  }

  /** A gpu block that begins with the partial block's KV: its own when nobody else needs it, else a copy. */
  #takePartial(block: CachedBlock, plan: Plan, toLoad: LoadList): BlockNumber {
    const { gpu } = this.residency;
    const length = plan.length - plan.blocks.length * this.options.blockTokens;
    const isOpen = length === block.tokens.length && length < this.options.blockTokens;
    if (block.gpu === ABSENT) {
      toLoad.add(block, this.residency.takeGpu()!, isOpen);
      return toLoad.lastGpu;
    }
    if (isOpen && block.gpuLoad === null && gpu.refCount(block.gpu) === 1) return block.gpu;
    const copy = this.residency.takeGpu()!;
    // One that is being loaded for another sequence is loaded once more: its host copy stays until then.
    if (block.gpuLoad === null) this.residency.copyGpu(block.gpu, copy);
    else toLoad.add(block, copy, false);
    this.residency.releaseGpu(block.gpu);
    return copy;
  }

  #countTiers(plan: Plan, { fetched }: QueuedPrompt): CachedTokens {
    const cached = { gpu: 0, host: 0, disk: 0 };
    const tierOf = (block: CachedBlock) =>
      fetched.has(block) ? "disk" : block.gpu === ABSENT ? "host" : "gpu";
    for (const block of plan.blocks) cached[tierOf(block)] += this.options.blockTokens;
    const rest = plan.length - plan.blocks.length * this.options.blockTokens;
    if (plan.partial !== null) cached[tierOf(plan.partial)] += rest;
    return cached;
  }

  #missReasons(plan: Plan, { tokens, limit }: QueuedPrompt): ReadonlyMap<MissReason, number> {
    const reasons = this.matcher.missReasons(plan.match, tokens, limit);
    const unused = plan.match.length - plan.length;
    if (plan.cutReason !== null && unused > 0) {
      reasons.set(plan.cutReason, (reasons.get(plan.cutReason) ?? 0) + unused);
    }
    return reasons;
  }
}

function usedBlocks({ blocks, partial }: Plan): readonly CachedBlock[] {
  return partial === null ? blocks : [...blocks, partial];
}

/** Can be had without a read from disk. */
function isHere(block: CachedBlock): boolean {
  return block.gpu !== ABSENT || isHostReady(block);
}

/** Not while it is still being loaded and its host copy is gone already. */
function canCopy(block: CachedBlock): boolean {
  return block.gpuLoad === null || isHostReady(block);
}

function withoutPartial(plan: Plan, { blockTokens }: OpenerOptions): Plan {
  return { ...plan, partial: null, length: plan.blocks.length * blockTokens, cutReason: "evicted" };
}

/** Blocks to be loaded, and where to. */
class LoadList {
  readonly blocks: CachedBlock[] = [];
  readonly gpuBlocks: BlockNumber[] = [];
  readonly owned: boolean[] = [];

  get lastGpu(): BlockNumber {
    return this.gpuBlocks.at(-1)!;
  }

  add(block: CachedBlock, gpu: BlockNumber, isOwned: boolean): void {
    this.blocks.push(block);
    this.gpuBlocks.push(gpu);
    this.owned.push(isOwned);
  }
}
