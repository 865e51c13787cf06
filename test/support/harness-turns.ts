// Turns of made-up conversations through an engine harness: what a test of the cache asks, and that the answer is
// right.

import { expect } from "bun:test";
import type { EngineRequest, FinishEvent } from "../../sidecar/engine/request.ts";
import type { EngineHarness } from "./engine-harness.ts";
import { FAKE_VOCAB, GREEDY } from "./fake-runner.ts";
import { SeededRandom } from "./seeded-random.ts";

/** Until the most tokens, whatever they are. */
export const ENDLESS = { ...GREEDY, ignoreEos: true };

/** The same for the same seed. */
export function prompt(length: number, seed = 1): number[] {
  const random = new SeededRandom(seed);
  return Array.from({ length }, () => random.integer(1, FAKE_VOCAB - 1));
}

/** One turn, to its end; its answer must be the reference's. */
export function ask(
  harness: EngineHarness,
  tokens: readonly number[],
  maxTokens = 6,
  changes: Partial<EngineRequest> = {},
): FinishEvent {
  const id = harness.submit(tokens, { maxTokens, sampling: ENDLESS, ...changes });
  harness.runToEnd();
  const { tokens: answer, finish } = harness.answer(id);
  const expected = harness.reference({ tokens: Int32Array.from(tokens), maxTokens, sampling: ENDLESS });
  expect(answer).toEqual(expected.tokens);
  return finish!;
}
