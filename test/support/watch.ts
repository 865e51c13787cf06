// Waiting for conditions without looking at the clock.

/** Notes that something has happened; who waits for a condition looks again each time. */
export class Watch {
  readonly #waiting = new Set<() => void>();

  notify(): void {
    for (const wake of this.#waiting) wake();
    this.#waiting.clear();
  }

  async until(condition: () => boolean): Promise<void> {
    while (!condition()) await new Promise<void>((resolve) => this.#waiting.add(resolve));
  }
}
