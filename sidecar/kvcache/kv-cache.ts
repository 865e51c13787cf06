// The face that the engine sees: queue a prompt, open a sequence on whatever prefix is cached in any tier, extend it
// block by block, commit what was computed so that others can share it, close it without losing anything.

import { assert } from "../assert.ts";
import { Background, type BackgroundOptions } from "./background.ts";
import { BlockChain, sliceTokens } from "./block-chain.ts";
import { type BlockHasher, type BlockId, rootId, sha256Hasher } from "./block-hash.ts";
import { fingerprintDigest } from "./block-header.ts";
import { BlockMoves } from "./block-moves.ts";
import { ABSENT, type CachedBlock, newCachedBlock } from "./cached-block.ts";
import { CostModel } from "./cost-model.ts";
import type { CopyDevice, LayerTransfer } from "./layer-transfer.ts";
import type { MissReason } from "./lost-blocks.ts";
import type { BlockTable, OpenedSequence, QueuedPrompt } from "./opened-sequence.ts";
import { CachePolicy, type Keep, type PolicyName } from "./policy.ts";
import { PrefixMatcher } from "./prefix-match.ts";
import { PromptOpener } from "./prompt-opener.ts";
import { type BlockCopier, type LowerTiers, Residency } from "./residency.ts";
import { StepTimes } from "./step-times.ts";
import { TruncationRule } from "./view.ts";

/** What the cache needs from a device; tests give a fake. */
export type KvDevice = CopyDevice & BlockCopier;

export interface KvCacheOptions {
  readonly blockTokens: number;
  readonly blockBytes: number;
  readonly layers: number;
  readonly gpuBlocks: number;
  /** Everything that changes the numbers: weights, config, dtypes, layout, numeric mode. */
  readonly fingerprint: string;
  /** Longest view, in tokens. */
  readonly maxTokens: number;
  readonly keepBlocks: number;
  readonly truncationRatio: number;
  readonly policy: PolicyName;
  /** Blocks of host and disk together. */
  readonly windowBlocks: number;
  readonly isExclusive: boolean;
  readonly recompute: "auto" | "never";
  /** Layers that must be resident before a step starts; null: as many as hide the rest behind the computation. */
  readonly preloadLayers: number | null;
  /** A step may wait so long for layers that are still coming. */
  readonly maxLoadStallMs: number;
  readonly background: BackgroundOptions;
  readonly hasher?: BlockHasher;
}

export class KvCache {
  readonly blockTokens: number;
  readonly rule: TruncationRule;
  readonly residency: Residency;
  readonly moves: BlockMoves;
  readonly background: Background;
  readonly costs: CostModel;
  /** The engine measures. */
  readonly stepTimes = new StepTimes();
  readonly policy: CachePolicy<CachedBlock>;
  readonly #matcher: PrefixMatcher;
  readonly #opener: PromptOpener;
  readonly #hash: BlockHasher;
  readonly #digest: Uint8Array;
  queriedTokens = 0;
  hitTokens = 0;
  /** Published since the last startSaves(). */
  #unsaved: CachedBlock[] = [];

  /** `tiersBelow` makes the tiers below the gpu in the order that the policy gives them. */
  constructor(
    readonly device: KvDevice,
    readonly options: KvCacheOptions,
    tiersBelow: (policy: CachePolicy<CachedBlock>) => LowerTiers = () => ({ host: null, disk: null }),
  ) {
    const { blockTokens, maxTokens, keepBlocks, truncationRatio, policy, windowBlocks } = options;
    this.blockTokens = blockTokens;
    this.rule = new TruncationRule({ blockTokens, maxTokens, keepBlocks, ratio: truncationRatio });
    this.#hash = options.hasher ?? sha256Hasher;
    this.#digest = fingerprintDigest(options.fingerprint);
    this.policy = new CachePolicy<CachedBlock>({ policy, windowBlocks });
    const wantsSecondUse = options.background.admission === "second-touch";
    this.residency = new Residency(device, this.policy, tiersBelow(this.policy), { ...options, wantsSecondUse });
    this.moves = new BlockMoves(device, this.residency);
    this.background = new Background(this.residency, this.moves, options.background);
    const { index, lost } = this.residency;
    const { loadRate, readRate } = this.moves;
    this.costs = new CostModel(options, loadRate, readRate, this.stepTimes);
    this.#matcher = new PrefixMatcher(index, lost);
    this.#opener = new PromptOpener(this.residency, this.moves, this.#matcher, this.costs, options);
  }

  /** Ids for a new sequence of the account with this salt. */
  chain(salt: Uint8Array): BlockChain {
    const chainUnder = (digest: Uint8Array, former: BlockChain | null) =>
      new BlockChain(rootId(this.#hash, salt, digest), this.rule, this.#hash, former);
    const { formerDigest } = this.residency.lost;
    return chainUnder(this.#digest, formerDigest === null ? null : chainUnder(formerDigest, null));
  }

  get availableBlocks(): number {
    return this.residency.gpu.availableCount;
  }

  get blockCount(): number {
    return this.residency.gpu.blockCount;
  }

  /** The policy learns that these tokens will be wanted; `isNext`: before all others (it was preempted). */
  enqueue(
    prompt: Pick<QueuedPrompt, "chain" | "tokens" | "limit" | "keep">,
    isNext = false,
  ): QueuedPrompt {
    const { chain, tokens, limit } = prompt;
    const { blocks, partial } = this.#matcher.match(chain, tokens, limit);
    const wanted = partial === null ? blocks : [...blocks, partial.block];
    const waiter = isNext ? this.policy.requeue(wanted) : this.policy.enqueue(wanted);
    return { ...prompt, waiter, fetched: new Set(), fetchDeadlineMs: null };
  }

  /** The prompt left the queue: it was opened, or nobody wants it any more. */
  dequeue(prompt: QueuedPrompt): void {
    if (prompt.waiter !== null) this.policy.dequeue(prompt.waiter);
    prompt.waiter = null;
  }

  /**
   * Starts a sequence on the longest cached prefix and takes blocks for `room` tokens of it. "no-room": there are not
   * enough gpu blocks; "reading": blocks are on their way from disk. Nothing is held then; ask again later.
   */
  open(
    prompt: QueuedPrompt,
    room: number,
    now: { readonly nowMs: number; readonly isShared: boolean },
  ): OpenedSequence | "no-room" | "reading" {
    const opened = this.#opener.open(prompt, room, now);
    if (typeof opened === "string") return opened;
    this.dequeue(prompt);
    this.queriedTokens += prompt.limit;
    this.hitTokens += opened.length;
    return opened;
  }

  /** A step that waits layer by layer for these loads would not be held up by them. */
  mayJoin(loads: readonly LayerTransfer[], rowCount: number): boolean {
    return loads.every((load) => this.#mayJoin(load, rowCount));
  }

  /**
   * Makes room for `length` positions of the view. Otherwise the table stays as it is: "clearing" while what is in the
   * way moves down to host memory (ask again), "no-room" when there are not enough blocks.
   */
  extend(table: BlockTable, length: number, nowMs: number): "extended" | "clearing" | "no-room" {
    const missing = Math.ceil(length / this.blockTokens) - table.blocks.length;
    if (missing <= 0) return "extended";
    if (missing > this.availableBlocks + this.residency.descending.size) return "no-room";
    if (!this.moves.clearGpu(missing, nowMs, false)) return "clearing";
    if (missing > this.availableBlocks) return "no-room";
    for (let i = 0; i < missing; i++) table.blocks.push(this.residency.takeGpu()!);
    return "extended";
  }

  /**
   * Tells that positions [0, computed) of the view hold the KV of `tokens`: full blocks become findable. When two
   * sequences computed the same block, the first keeps the id and the second's copy stays its own.
   */
  commit(table: BlockTable, tokens: ArrayLike<number>, computed: number, nowMs: number): void {
    const fullCount = Math.floor(computed / this.blockTokens);
    for (let j = table.committedCount; j < fullCount; j++) {
      const index = this.rule.fullIndex(j, table.drops);
      const block = sliceTokens(tokens, index * this.blockTokens, (index + 1) * this.blockTokens);
      this.#publish(table, j, table.chain.name(index, tokens), block, nowMs);
    }
    table.committedCount = Math.max(table.committedCount, fullCount);
  }

  /** commit(), and the open last block becomes findable too, while the sequence may go on filling it. */
  commitOpen(table: BlockTable, tokens: ArrayLike<number>, computed: number, nowMs: number): void {
    this.commit(table, tokens, computed, nowMs);
    const place = table.committedCount;
    if (computed <= place * this.blockTokens) return;
    const index = this.rule.fullIndex(place, table.drops);
    const end = computed + (index - place) * this.blockTokens;
    const name = table.chain.openName(index, tokens, end);
    this.#publish(table, place, name, sliceTokens(tokens, index * this.blockTokens, end), nowMs);
  }

  /** The view is full: its oldest blocks after the kept prefix leave it. All of it must be committed. */
  drop(table: BlockTable): void {
    const { keepBlocks, dropBlocks } = this.rule;
    assert(table.committedCount >= keepBlocks + dropBlocks, "what leaves the view was computed");
    for (const block of table.blocks.splice(keepBlocks, dropBlocks)) this.residency.releaseGpu(block);
    table.committedCount -= dropBlocks;
    table.drops++;
  }

  /** Ends the sequence. What was computed stays cached until its blocks are needed, the last block first. */
  close(table: BlockTable, tokens: ArrayLike<number>, computed: number, nowMs: number): void {
    this.commitOpen(table, tokens, computed, nowMs);
    const owners = table.blocks.map((block) => this.residency.gpu.owner(block)).filter((owner) => owner !== null);
    this.#touch(owners, nowMs, table.keep);
    for (let j = table.blocks.length - 1; j >= 0; j--) this.residency.releaseGpu(table.blocks[j]!);
    table.blocks.length = 0;
  }

  /** Ids of every block that positions [0, computed) of the view, and what has left it, have filled or begun. */
  blockIds({ chain, drops }: BlockTable, tokens: ArrayLike<number>, computed: number): BlockId[] {
    const length = this.rule.fullLength(computed, drops);
    const ids = [...chain.ids(tokens, length)];
    const index = Math.floor(length / this.blockTokens);
    if (length > index * this.blockTokens) ids.push(chain.openName(index, tokens, length).id);
    return ids;
  }

  /**
   * Write-through: what was computed since the last call starts to move to host memory; false: there was nothing.
   * "by-layer": each layer behind its computation by the step that is enqueued next, see afterLayer().
   */
  startSaves(order: "now" | "by-layer", nowMs: number): boolean {
    if (this.#unsaved.length === 0) return false;
    const unsaved = this.#unsaved;
    this.#unsaved = this.moves.save(unsaved, order, nowMs);
    return this.#unsaved.length < unsaved.length;
  }

  /** A layer of the step that is being enqueued: its saves may follow. */
  afterLayer(layer: number): void {
    this.moves.afterLayer(layer);
  }

  noteStepEnqueued(): void {
    this.residency.noteStepEnqueued();
  }

  noteStepCompleted(): void {
    this.residency.noteStepCompleted();
  }

  /** Something moves, or will have to, even if no request comes. */
  isBusy(nowMs: number): boolean {
    return this.moves.inFlight > 0 || this.background.isWaiting(nowMs);
  }

  /** Removes these blocks, and what continues them, from all tiers; says how many were in each. */
  forget(
    ids: readonly BlockId[],
    nowMs: number,
    reason: MissReason = "deleted",
  ): Record<"gpu" | "host" | "disk", number> {
    const counts = { gpu: 0, host: 0, disk: 0 };
    const { index } = this.residency;
    const left = [...ids];
    for (let id = left.pop(); id !== undefined; id = left.pop()) {
      // Of a block that was lost, too: what continues it may still be here.
      for (const child of index.children(id)) left.push(child.id);
      const block = index.get(id);
      if (block === null) continue;
      for (const tier of this.residency.drop(block, reason, nowMs)) counts[tier]++;
    }
    return counts;
  }

  /** Stands for all that was deleted so far, see isErased(). */
  get deletions(): number {
    return this.residency.tiers.disk?.deletions ?? 0;
  }

  /** All of the first `deletions` are off the disk, too. */
  isErased(deletions: number): boolean {
    return this.residency.tiers.disk?.isErased(deletions) ?? true;
  }

  /** Learns what has moved, and does what is due. */
  poll(nowMs: number): void {
    this.moves.poll(nowMs);
    this.background.turn(nowMs);
  }

  /** For a stop that leaves host memory to the next process: says of all that is whole there what it is. */
  sealHost(): void {
    this.residency.tiers.host?.seal(Infinity);
  }

  /** For an orderly stop: goes on writing what the disk admits; false when nothing is left. */
  flush(nowMs: number): boolean {
    this.moves.poll(nowMs);
    return this.background.flush(nowMs);
  }

  /** Throws unless index, pools and policy agree. For tests. */
  checkInvariants(): void {
    this.residency.checkInvariants();
  }

  /** CachedAttention's S_buf law (3.2.1): the rest of the load must fit behind the computation. */
  #mayJoin(load: LayerTransfer, rowCount: number): boolean {
    const ready = load.readyLayers();
    if (ready === load.layers) return true;
    if (!load.isFlowing) return false;
    const { preloadLayers, maxLoadStallMs, blockBytes } = this.options;
    if (preloadLayers !== null) return ready >= Math.min(preloadLayers, load.layers);
    const loadMs = this.moves.loadRate.expectedMs(load.hostSlots.length * blockBytes);
    const computeMs = this.stepTimes.expectedMs(rowCount);
    if (loadMs === null || computeMs === null) return false;
    return (loadMs * (load.layers - ready)) / load.layers <= computeMs + maxLoadStallMs;
  }

  #touch(blocks: readonly CachedBlock[], nowMs: number, keep: Keep): void {
    this.policy.touch(blocks, nowMs, keep);
    this.residency.touched(blocks, nowMs);
  }

  /** Makes the table's block findable under its name, unless one that says as much is known already. */
  #publish(
    table: BlockTable,
    place: number,
    name: ReturnType<BlockChain["name"]>,
    tokens: Int32Array,
    nowMs: number,
  ): void {
    const { residency } = this;
    const gpu = table.blocks[place]!;
    const owner = residency.gpu.owner(gpu);
    const known = residency.index.get(name.id);
    if (owner === known && owner !== null) return;
    if (owner !== null) {
      if (known === null) residency.rename(owner, name, tokens, nowMs);
      else return;
    } else if (known === null) {
      const depth = this.rule.fullIndex(place, table.drops);
      residency.publish(newCachedBlock(name, tokens, depth), gpu, nowMs);
    } else {
      // Known, but perhaps only below: the copy that was just computed spares a load.
      const isSame = known.prefixCheck === name.prefixCheck && known.tokens.length === tokens.length;
      if (known.gpu !== ABSENT || !isSame || !known.tokens.every((token, i) => token === tokens[i])) return;
      residency.publish(known, gpu, nowMs);
    }
    const block = residency.gpu.owner(gpu)!;
    this.#touch([block], nowMs, table.keep);
    if (!this.options.isExclusive) this.#unsaved.push(block);
  }
}
