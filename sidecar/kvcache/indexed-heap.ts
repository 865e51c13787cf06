// A binary heap whose items know their place in it, so that any item can be removed or re-ordered in O(log
// n). An item may be in several heaps at once, one per slot of its `heapIndexes`.

import { assert } from "../assert.ts";

/** Where an item is in each heap it may belong to; -1: not in that heap. */
export interface HeapItem {
  readonly heapIndexes: number[];
}

export class IndexedHeap<Item extends HeapItem> {
  readonly #items: Item[] = [];

  constructor(
    readonly slot: number,
    /** A strict order: true when `a` leaves the heap before `b`. */
    readonly comesFirst: (a: Item, b: Item) => boolean,
  ) {}

  get size(): number {
    return this.#items.length;
  }

  has(item: Item): boolean {
    return item.heapIndexes[this.slot]! >= 0;
  }

  peek(): Item | null {
    return this.#items[0] ?? null;
  }

  add(item: Item): void {
    assert(!this.has(item), "the item is in the heap already");
    this.#items.push(item);
    this.#siftUp(item, this.#items.length - 1);
  }

  remove(item: Item): void {
    const index = item.heapIndexes[this.slot]!;
    assert(this.#items[index] === item, "the item is not in the heap");
    item.heapIndexes[this.slot] = -1;
    const last = this.#items.pop()!;
    if (last === item) return;
    this.#place(last, index);
    this.update(last);
  }

  /**
   * Finds the item's new place after its key has changed. One item at a time: the others must be in order.
   */
  update(item: Item): void {
    const index = item.heapIndexes[this.slot]!;
    this.#siftUp(item, index);
    this.#siftDown(item, item.heapIndexes[this.slot]!);
  }

  /** In no particular order. */
  items(): IterableIterator<Item> {
    return this.#items.values();
  }

  /** Throws unless every item knows its place and comes no earlier than its parent. For tests. */
  checkInvariants(): void {
    this.#items.forEach((item, index) => {
      assert(item.heapIndexes[this.slot] === index, `item ${index} does not know its place`);
      const parent = this.#items[(index - 1) >> 1];
      assert(index === 0 || !this.comesFirst(item, parent!), `item ${index} is above its place`);
    });
  }

  #place(item: Item, index: number): void {
    this.#items[index] = item;
    item.heapIndexes[this.slot] = index;
  }

  #siftUp(item: Item, start: number): void {
    let index = start;
    while (index > 0) {
      const parentIndex = (index - 1) >> 1;
      const parent = this.#items[parentIndex]!;
      if (!this.comesFirst(item, parent)) break;
      this.#place(parent, index);
      index = parentIndex;
    }
    this.#place(item, index);
  }

  #siftDown(item: Item, start: number): void {
    const count = this.#items.length;
    let index = start;
    for (;;) {
      let childIndex = 2 * index + 1;
      if (childIndex >= count) break;
      const right = childIndex + 1;
      if (right < count && this.comesFirst(this.#items[right]!, this.#items[childIndex]!)) childIndex = right;
      const child = this.#items[childIndex]!;
      if (!this.comesFirst(child, item)) break;
      this.#place(child, index);
      index = childIndex;
    }
    this.#place(item, index);
  }
}
