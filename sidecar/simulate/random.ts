// Random numbers named by what they are for: the same seed and names give the same number, whatever was
// drawn before. So every policy meets the same arrivals and the same think times.

/** In (0, 1), from the seed and up to three whole numbers. */
export function uniform(seed: number, ...names: readonly number[]): number {
  let hash = mix(seed >>> 0);
  for (const name of names) hash = mix((hash ^ (name + 0x9e3779b9)) >>> 0);
  return (hash + 0.5) / 2 ** 32;
}

/** Exponentially distributed with this mean. */
export function exponential(mean: number, seed: number, ...names: readonly number[]): number {
  return -Math.log(uniform(seed, ...names)) * mean;
}

/** The 32-bit finalizer of MurmurHash3, after a step of the golden ratio. */
function mix(value: number): number {
  let hash = (value + 0x6d2b79f5) >>> 0;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}
