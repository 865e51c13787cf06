// Assertions for programmer errors. Input from outside is parsed and answered with an error instead.

export class AssertionError extends Error {
  override name = "AssertionError";
}

/** Throws AssertionError unless `condition` holds; `message` names what was expected. */
export function assert(condition: unknown, message: string): asserts condition {
  if (!condition) throw new AssertionError(message);
}

/** Throws unless `value` is an integer in [0, 2^32). */
export function assertU32(value: number, name: string): void {
  assert(Number.isInteger(value) && value >= 0 && value < 2 ** 32, `${name} must be a u32, not ${value}`);
}

/** For the default branch of an exhaustive switch. */
export function unreachable(value: never): never {
  throw new AssertionError(`unreachable: ${String(value)}`);
}
