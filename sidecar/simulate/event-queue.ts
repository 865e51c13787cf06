// The clock of the simulation: what happens next. Events of the same moment happen in the order they were
// planned.

import { IndexedHeap } from "../kvcache/indexed-heap.ts";

interface PlannedEvent {
  readonly timeMs: number;
  readonly order: number;
  readonly run: () => void;
  readonly heapIndexes: number[];
}

export class EventQueue {
  nowMs = 0;
  #plannedCount = 0;
  readonly #heap = new IndexedHeap<PlannedEvent>(0, (a, b) =>
    a.timeMs === b.timeMs ? a.order < b.order : a.timeMs < b.timeMs,
  );

  /** Returns a function that calls the event off. */
  at(timeMs: number, run: () => void): () => void {
    const event = { timeMs, order: this.#plannedCount++, run, heapIndexes: [-1] };
    this.#heap.add(event);
    return () => {
      if (this.#heap.has(event)) this.#heap.remove(event);
    };
  }

  after(delayMs: number, run: () => void): () => void {
    return this.at(this.nowMs + delayMs, run);
  }

  /** Runs until nothing is planned. */
  run(): void {
    for (let event = this.#heap.peek(); event !== null; event = this.#heap.peek()) {
      this.#heap.remove(event);
      this.nowMs = event.timeMs;
      event.run();
    }
  }
}
