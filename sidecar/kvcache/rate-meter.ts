// How fast something goes, learnt from what was measured: the median of the last few periods, so that it follows a disk
// that slows down or a GPU that others load, and one period in which this process was held up changes nothing. Periods
// in which little was moved do not count beside long ones: a few blocks take mostly the time of their start.

/** Of which the median counts: among transfers of about one size it follows a change after five. */
const PERIODS = 9;
/** Less than this share of the most is little, and does not count where so many other periods are left. */
const LONG_SHARE = 1 / 8;
const LONG_PERIODS_MIN = 3;
/** What ends so soon after another was moved beside it: one period, not a short one of its own. */
const SAME_PERIOD_MS = 1;
/** A period takes no more in when so much was added to it: a burst is several, or a slower one would not show. */
const BESIDE_MS_MAX = 10;

interface Period {
  amount: number;
  ms: number;
  /** Of these, for what was moved beside the first. */
  besideMs: number;
}

export class RateMeter {
  #periods: Period[] = [];
  #lastEndMs = -Infinity;

  /** Amount per millisecond; null before the first measurement. */
  get perMs(): number | null {
    if (this.#periods.length === 0) return null;
    const rates = this.#periodsThatCount().map(({ amount, ms }) => amount / ms).sort((a, b) => a - b);
    return rates[Math.floor(rates.length / 2)]!;
  }

  /** `amount` took from `startMs` to `endMs`, or began when what was measured last had ended. */
  note(amount: number, startMs: number, endMs: number): void {
    const elapsedMs = Math.max(0, endMs - Math.max(startMs, this.#lastEndMs));
    const isBeside = startMs < this.#lastEndMs && elapsedMs < SAME_PERIOD_MS;
    this.#lastEndMs = Math.max(this.#lastEndMs, endMs);
    if (amount <= 0) return;
    const last = this.#periods.at(-1);
    if (isBeside && last !== undefined && last.besideMs < BESIDE_MS_MAX) {
      last.amount += amount;
      last.ms += elapsedMs;
      last.besideMs += elapsedMs;
    } else if (elapsedMs > 0) {
      this.#periods = [...this.#periods, { amount, ms: elapsedMs, besideMs: 0 }].slice(-PERIODS);
    }
  }

  #periodsThatCount(): Period[] {
    const most = Math.max(...this.#periods.map(({ amount }) => amount));
    const long = this.#periods.filter(({ amount }) => amount >= most * LONG_SHARE);
    return long.length >= LONG_PERIODS_MIN ? long : this.#periods;
  }

  /** Expected duration, ms; null while nothing was measured. */
  expectedMs(amount: number): number | null {
    const { perMs } = this;
    return perMs === null ? null : amount / perMs;
  }
}
