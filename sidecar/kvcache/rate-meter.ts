// How fast something goes, learnt from what was measured: an average that forgets, so that it follows a disk that
// slows down or a GPU that others load.

/** Weight of a new measurement. */
const WEIGHT = 0.2;

export class RateMeter {
  #perMs: number | null = null;
  #lastEndMs = -Infinity;

  /** Amount per millisecond; null before the first measurement. */
  get perMs(): number | null {
    return this.#perMs;
  }

  /** `amount` took from `startMs` to `endMs`, or began when what was measured last had ended. */
  note(amount: number, startMs: number, endMs: number): void {
    const elapsedMs = endMs - Math.max(startMs, this.#lastEndMs);
    this.#lastEndMs = Math.max(this.#lastEndMs, endMs);
    if (elapsedMs <= 0 || amount <= 0) return;
    const measured = amount / elapsedMs;
    this.#perMs = this.#perMs === null ? measured : this.#perMs + WEIGHT * (measured - this.#perMs);
  }

  /** Expected duration, ms; null while nothing was measured. */
  expectedMs(amount: number): number | null {
    return this.#perMs === null ? null : amount / this.#perMs;
  }
}
