// The waiting queue as the cache sees it: whose blocks will be needed, in which order, and which of them
// fit a budget. Walking the queue from its head and counting each distinct block once, the first `budget`
// blocks are the window (CachedAttention, 3.3, by blocks instead of mean sessions). The window's far edge
// is kept up to date as sequences come and go: a change costs O(blocks of that sequence), never O(blocks of
// the queue).

import { assert } from "../assert.ts";
import { type BlockUse, OUTSIDE_WINDOW, type Waiter } from "./block-use.ts";

class QueueNode<Block> implements Waiter<Block> {
  previous: QueueNode<Block> | null = null;
  next: QueueNode<Block> | null = null;
  blocks: readonly Block[] = [];

  constructor(readonly ticket: number) {}
}

export class LookaheadWindow<Block extends BlockUse> {
  readonly #onChange: (block: Block) => void;
  #budget: number;
  #head: QueueNode<Block> | null = null;
  #tail: QueueNode<Block> | null = null;
  /** Inside are all blocks before #edge.blocks[#edgeIndex]; a null edge lies behind the tail. */
  #edge: QueueNode<Block> | null = null;
  #edgeIndex = 0;
  #insideCount = 0;

  /** `onChange` hears of every block whose `neededAt` has changed, one at a time. */
  constructor(budget: number, onChange: (block: Block) => void) {
    this.#budget = budget;
    this.#onChange = onChange;
  }

  /** Distinct blocks inside: never more than the budget. */
  get insideCount(): number {
    return this.#insideCount;
  }

  get budget(): number {
    return this.#budget;
  }

  set budget(budget: number) {
    this.#budget = budget;
    this.#balance();
  }

  /** A sequence joins the queue at its end. `blocks`: the cached blocks of its prompt, first block first. */
  append(blocks: readonly Block[]): Waiter<Block> {
    const node = new QueueNode<Block>((this.#tail?.ticket ?? 0) + 1);
    node.previous = this.#tail;
    if (this.#tail === null) this.#head = node;
    else this.#tail.next = node;
    this.#tail = node;
    this.#setBlocks(node, blocks);
    return node;
  }

  /** A preempted sequence returns to the head of the queue. */
  prepend(blocks: readonly Block[]): Waiter<Block> {
    const node = new QueueNode<Block>((this.#head?.ticket ?? 0) - 1);
    node.next = this.#head;
    if (this.#head === null) this.#tail = node;
    else this.#head.previous = node;
    this.#head = node;
    this.#setBlocks(node, blocks);
    return node;
  }

  /** The sequence keeps its place, but more (or fewer) blocks of its prompt are cached now. */
  replace(waiter: Waiter<Block>, blocks: readonly Block[]): void {
    const node = asNode(waiter);
    if (node === this.#edge) this.#edgeIndex = 0;
    this.#clearBlocks(node);
    this.#setBlocks(node, blocks);
  }

  /** The sequence runs now, or was aborted. */
  remove(waiter: Waiter<Block>): void {
    const node = asNode(waiter);
    if (node === this.#edge) {
      this.#edge = node.next;
      this.#edgeIndex = 0;
    }
    if (node.previous === null) this.#head = node.next;
    else node.previous.next = node.next;
    if (node.next === null) this.#tail = node.previous;
    else node.next.previous = node.previous;
    this.#clearBlocks(node);
    this.#balance();
  }

  /** The block has left all tiers: nobody can wait for it any more. */
  forget(block: Block): void {
    block.waiters.length = 0;
    this.#charge(block);
    this.#balance();
  }

  /** Visits the first `budget` distinct blocks that the queue needs, head first, until `visit` says false. */
  walk(budget: number, visit: (block: Block) => boolean): void {
    let left = budget;
    for (let node = this.#head; node !== null; node = node.next) {
      for (const block of node.blocks) {
        if (block.waiters[0] !== node) continue;
        if (left-- <= 0 || !visit(block)) return;
      }
    }
  }

  #setBlocks(node: QueueNode<Block>, blocks: readonly Block[]): void {
    node.blocks = blocks;
    let depth = -1;
    for (const block of blocks) {
      assert(block.depth > depth, "a sequence's blocks are in order of depth");
      depth = block.depth;
      insertInOrder(block.waiters, node);
      this.#charge(block);
    }
    this.#balance();
  }

  #clearBlocks(node: QueueNode<Block>): void {
    for (const block of node.blocks) {
      const index = block.waiters.indexOf(node);
      if (index < 0) continue; // forgotten meanwhile
      block.waiters.splice(index, 1);
      this.#charge(block);
    }
    node.blocks = [];
  }

  /** Brings `neededAt` and the count in line with who is charged for the block and where the edge is. */
  #charge(block: Block): void {
    const waiter = block.waiters[0];
    const isInside = waiter !== undefined && this.#isBeforeEdge(waiter, block);
    const neededAt = isInside ? waiter.ticket : OUTSIDE_WINDOW;
    if (neededAt === block.neededAt) return;
    this.#insideCount += Number(isInside) - Number(block.neededAt !== OUTSIDE_WINDOW);
    block.neededAt = neededAt;
    this.#onChange(block);
  }

  #isBeforeEdge(waiter: Waiter<BlockUse>, block: Block): boolean {
    const edge = this.#edge;
    if (edge === null || waiter.ticket < edge.ticket) return true;
    if (waiter !== edge) return false;
    const next = edge.blocks[this.#edgeIndex];
    return next === undefined || block.depth < next.depth;
  }

  /** Moves the edge until the budget is used, or everything is inside. */
  #balance(): void {
    while (this.#insideCount > this.#budget) this.#retreat();
    while (this.#insideCount < this.#budget && this.#edge !== null) this.#advance();
  }

  #retreat(): void {
    if (this.#edge === null || this.#edgeIndex === 0) {
      this.#edge = this.#edge === null ? this.#tail : this.#edge.previous;
      assert(this.#edge !== null, "blocks inside the window lie before its edge");
      this.#edgeIndex = this.#edge.blocks.length;
      return;
    }
    this.#edgeIndex--;
    this.#charge(this.#edge.blocks[this.#edgeIndex]!);
  }

  #advance(): void {
    const edge = this.#edge!;
    const block = edge.blocks[this.#edgeIndex];
    if (block === undefined) {
      this.#edge = edge.next;
      this.#edgeIndex = 0;
      return;
    }
    this.#edgeIndex++;
    this.#charge(block);
  }
}

function asNode<Block>(waiter: Waiter<Block>): QueueNode<Block> {
  assert(waiter instanceof QueueNode, "a waiter is what append() or prepend() returned");
  return waiter as QueueNode<Block>;
}

function insertInOrder(waiters: Waiter<BlockUse>[], waiter: Waiter<BlockUse>): void {
  let index = waiters.length;
  while (index > 0 && waiters[index - 1]!.ticket > waiter.ticket) index--;
  waiters.splice(index, 0, waiter);
}
