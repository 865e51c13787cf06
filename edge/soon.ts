// Waiting for something that may never come, but not for long: then the rest goes on without it.

/** What the promise brings within the time, else null; what it brings later is lost. */
export async function soon<T>(work: Promise<T>, timeoutMs: number): Promise<T | null> {
  const { promise: isLate, resolve } = Promise.withResolvers<null>();
  const timer = setTimeout(() => resolve(null), timeoutMs);
  try {
    return await Promise.race([work, isLate]);
  } finally {
    clearTimeout(timer);
  }
}
