// Means that the benches print, and how far they can be trusted.

import { SeededRandom } from "../support/seeded-random.ts";

export function mean(values: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i]!;
  return sum / values.length;
}

/** Interval that holds the mean with 95 %: percentiles of the means of resampled values (Efron's bootstrap). */
export function meanInterval(values: readonly number[], seed = 1, resamples = 10_000): [low: number, high: number] {
  const random = new SeededRandom(seed);
  const means = Float64Array.from({ length: resamples }, () => {
    let sum = 0;
    for (let i = 0; i < values.length; i++) sum += values[random.integer(0, values.length - 1)]!;
    return sum / values.length;
  }).sort();
  return [means[Math.floor(resamples * 0.025)]!, means[Math.floor(resamples * 0.975)]!];
}
