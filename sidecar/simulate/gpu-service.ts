// The service: a continuous batch. One prefill runs at a time and stops the decodes for its duration; in
// between all decoding turns gain tokens at the same rate. Slots bound how many turns are loading,
// prefilling or decoding.

import { IndexedHeap } from "../kvcache/indexed-heap.ts";
import type { EventQueue } from "./event-queue.ts";

export interface ServiceOptions {
  /** Turns in service at once. */
  readonly batch: number;
  /** Tokens per second, whole GPU. */
  readonly prefillRate: number;
  /** Tokens per second of one turn. */
  readonly decodeRate: number;
  /** Host to GPU, bytes per second; a load overlaps its own prefill layer by layer. */
  readonly pcieRate: number;
}

/** What one turn wants of the GPU. */
export interface GpuWork {
  readonly computedTokens: number;
  readonly loadedBytes: number;
  readonly outputTokens: number;
  readonly onFirstToken: () => void;
  readonly onFinish: () => void;
}

interface Decode {
  readonly work: GpuWork;
  /** Value of the decode clock at which it is done. */
  readonly endClock: number;
  readonly heapIndexes: number[];
}

export class GpuService {
  #inService = 0;
  /** Time during which prefills or decodes ran. */
  prefillMs = 0;
  decodeMs = 0;
  computedTokens = 0;
  readonly #prefills: GpuWork[] = [];
  #isPrefilling = false;
  readonly #decodes = new IndexedHeap<Decode>(0, (a, b) => a.endClock < b.endClock);
  /** Tokens that a turn decoding since the start would have. */
  #decodeClock = 0;
  #decodingSinceMs = 0;
  #callOff: () => void = () => {};

  constructor(
    readonly events: EventQueue,
    readonly options: ServiceOptions,
  ) {}

  get hasFreeSlot(): boolean {
    return this.#inService < this.options.batch;
  }

  takeSlot(): void {
    this.#inService++;
  }

  /** What the turn in a slot needs is in host memory: it may be computed. */
  submit(work: GpuWork): void {
    this.#prefills.push(work);
    this.#next();
  }

  #next(): void {
    if (this.#isPrefilling) return;
    this.#pauseDecodes();
    const work = this.#prefills.shift();
    if (work === undefined) {
      this.#resumeDecodes();
      return;
    }
    const { prefillRate, pcieRate } = this.options;
    const durationMs = 1000 * Math.max(work.computedTokens / prefillRate, work.loadedBytes / pcieRate);
    this.#isPrefilling = true;
    this.prefillMs += durationMs;
    this.computedTokens += work.computedTokens;
    this.events.after(durationMs, () => {
      this.#isPrefilling = false;
      this.#decodingSinceMs = this.events.nowMs;
      // The prefill gives the first token.
      const endClock = this.#decodeClock + Math.max(0, work.outputTokens - 1);
      this.#decodes.add({ work, endClock, heapIndexes: [-1] });
      work.onFirstToken();
      this.#next();
    });
  }

  #pauseDecodes(): void {
    this.#callOff();
    this.#callOff = () => {};
    if (this.#decodes.size > 0 && !this.#isPrefilling) {
      const elapsedMs = this.events.nowMs - this.#decodingSinceMs;
      this.decodeMs += elapsedMs;
      this.#decodeClock += (elapsedMs / 1000) * this.options.decodeRate;
    }
    this.#decodingSinceMs = this.events.nowMs;
  }

  #resumeDecodes(): void {
    this.#decodingSinceMs = this.events.nowMs;
    const first = this.#decodes.peek();
    if (first === null) return;
    const leftMs = (1000 * Math.max(0, first.endClock - this.#decodeClock)) / this.options.decodeRate;
    this.#callOff = this.events.after(leftMs, () => {
      this.#pauseDecodes();
      this.#decodes.remove(first);
      this.#decodeClock = Math.max(this.#decodeClock, first.endClock);
      this.#inService--;
      first.work.onFinish();
      this.#next();
    });
  }
}
