// How fast something goes, learnt from what was measured: the median of the last few periods, so that it follows a disk
// that slows down or a GPU that others load, and one period in which this process was held up changes nothing. A period
// counts by what was moved in it: a few blocks take mostly the time of a start, and say little of a long history.

/** Of which the median counts: it follows a change after five. */
const PERIODS = 9;
/** What ends so soon after another was moved beside it: one period, not a short one of its own. */
const SAME_PERIOD_MS = 1;

interface Period {
  amount: number;
  ms: number;
}

export class RateMeter {
  #periods: Period[] = [];
  #lastEndMs = -Infinity;

  /** Amount per millisecond; null before the first measurement. */
  get perMs(): number | null {
    if (this.#periods.length === 0) return null;
    const slowestFirst = this.#periods.toSorted((a, b) => a.amount / a.ms - b.amount / b.ms);
    const half = this.#periods.reduce((sum, { amount }) => sum + amount, 0) / 2;
    let moved = 0;
    const middle = slowestFirst.find(({ amount }) => (moved += amount) > half)!;
    return middle.amount / middle.ms;
  }

  /** `amount` took from `startMs` to `endMs`, or began when what was measured last had ended. */
  note(amount: number, startMs: number, endMs: number): void {
    const elapsedMs = Math.max(0, endMs - Math.max(startMs, this.#lastEndMs));
    const isBeside = startMs < this.#lastEndMs && elapsedMs < SAME_PERIOD_MS;
    this.#lastEndMs = Math.max(this.#lastEndMs, endMs);
    if (amount <= 0) return;
    const last = this.#periods.at(-1);
    if (isBeside && last !== undefined) {
      last.amount += amount;
      last.ms += elapsedMs;
    } else if (elapsedMs > 0) {
      this.#periods = [...this.#periods, { amount, ms: elapsedMs }].slice(-PERIODS);
    }
  }

  /** Expected duration, ms; null while nothing was measured. */
  expectedMs(amount: number): number | null {
    const { perMs } = this;
    return perMs === null ? null : amount / perMs;
  }
}
