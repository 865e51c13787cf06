// What `bun test` says at its end, as numbers.

export interface Counts {
  readonly passed: number;
  readonly failed: number;
}

/** A run that ended badly without a failed test, such as a crash, counts as one failure. */
export function countTests(output: string, exitCode: number): Counts {
  const count = (word: string) => Number(new RegExp(`^\\s*(\\d+) ${word}s?$`, "m").exec(output)?.[1] ?? 0);
  const passed = count("pass");
  const failed = count("fail") + count("error");
  return { passed, failed: failed === 0 && exitCode !== 0 ? 1 : failed };
}

export function addCounts(a: Counts, b: Counts): Counts {
  return { passed: a.passed + b.passed, failed: a.failed + b.failed };
}
