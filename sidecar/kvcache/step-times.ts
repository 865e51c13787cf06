// How long a step takes by its rows, learnt from the steps that ran: a fixed part (the weights are read once, for one
// row or a hundred) and a part for each row. A line through what was measured, older steps counting less and less.

/** A step counts half after so many others. */
const HALF_LIFE_STEPS = 50;
const DECAY = 0.5 ** (1 / HALF_LIFE_STEPS);

export class StepTimes {
  #weight = 0;
  #rows = 0;
  #ms = 0;
  #rowsRows = 0;
  #rowsMs = 0;
  #lastEndMs = -Infinity;

  /** A step of so many rows was enqueued at `startMs` and done at `endMs`; steps run one after the other. */
  note(rows: number, startMs: number, endMs: number): void {
    const ms = endMs - Math.max(startMs, this.#lastEndMs);
    this.#lastEndMs = endMs;
    if (ms <= 0 || rows <= 0) return;
    this.#weight = this.#weight * DECAY + 1;
    this.#rows = this.#rows * DECAY + rows;
    this.#ms = this.#ms * DECAY + ms;
    this.#rowsRows = this.#rowsRows * DECAY + rows * rows;
    this.#rowsMs = this.#rowsMs * DECAY + rows * ms;
  }

  /** Ms for each further row; null before anything was measured. */
  get msPerRow(): number | null {
    return this.#line()?.perRow ?? null;
  }

  /** Expected ms of a step of so many rows; null before anything was measured. */
  expectedMs(rows: number): number | null {
    const line = this.#line();
    return line === null ? null : line.fixed + rows * line.perRow;
  }

  /** Least squares; with steps of one size alone, all of the time is taken to be the rows'. */
  #line(): { fixed: number; perRow: number } | null {
    if (this.#weight === 0) return null;
    const [meanRows, meanMs] = [this.#rows / this.#weight, this.#ms / this.#weight];
    const variance = this.#rowsRows / this.#weight - meanRows * meanRows;
    const covariance = this.#rowsMs / this.#weight - meanRows * meanMs;
    const through = { fixed: 0, perRow: meanMs / meanRows };
    if (variance < 1e-6 * meanRows * meanRows) return through;
    const perRow = covariance / variance;
    const fixed = meanMs - perRow * meanRows;
    // Noise may tilt the line past what can be: no step takes less than none, no row gives time back.
    return perRow <= 0 || fixed < 0 ? through : { fixed, perRow };
  }
}
