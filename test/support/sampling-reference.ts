// kvs_sample in doubles, step by step as native/kvasir.h orders them. Where rounding could go either way, it says
// which tokens are right.

import type { RowSampling } from "../../sidecar/model/batch.ts";

export interface SampledRow {
  readonly logits: ArrayLike<number>;
  /** Tokens [0, position]. */
  readonly tokens: ArrayLike<number>;
  readonly promptLength: number;
  readonly rngPosition: number;
}

/** Relative distance within which floats may decide a comparison otherwise than doubles. */
const DOUBT = 2e-6;

/** First word of Philox4x32-10 with counter (position, 0, 0, 0). */
export function philox(seed: number, position: number): number {
  const mask = 0xffffffffn;
  let [c0, c1, c2, c3] = [BigInt(position), 0n, 0n, 0n];
  let [k0, k1] = [BigInt(seed % 2 ** 32), BigInt(Math.floor(seed / 2 ** 32))];
  for (let round = 0; round < 10; round++) {
    const [p0, p1] = [0xd2511f53n * c0, 0xcd9e8d57n * c2];
    [c0, c1, c2, c3] = [(p1 >> 32n) ^ c1 ^ k0, p1 & mask, (p0 >> 32n) ^ c3 ^ k1, p0 & mask];
    [k0, k1] = [(k0 + 0x9e3779b9n) & mask, (k1 + 0xbb67ae85n) & mask];
  }
  return Number(c0);
}

/** Penalties and bias. */
export function changedLogits(row: SampledRow, sampling: RowSampling): number[] {
  const logits = Array.from(row.logits);
  const tokens = Array.from(row.tokens);
  for (const id of new Set(tokens)) {
    const factor = sampling.repetitionPenalty;
    logits[id] = logits[id]! > 0 ? logits[id]! / factor : logits[id]! * factor;
  }
  const answer = tokens.slice(row.promptLength);
  for (const id of new Set(answer)) {
    const count = answer.filter((token) => token === id).length;
    logits[id]! -= count * sampling.frequencyPenalty + sampling.presencePenalty;
  }
  for (const [id, bias] of sampling.logitBias) logits[id]! += bias;
  return logits;
}

/** Probabilities after temperature, top_k, top_p and min_p, not renormalised; `doubt` moves the thresholds. */
export function keptWeights(logits: readonly number[], sampling: RowSampling, doubt: number): number[] {
  const most = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp((logit - most) / sampling.temperature));
  const byLogit = logits.map((_, id) => id).toSorted((a, b) => logits[b]! - logits[a]! || a - b);
  const candidates = sampling.topK === 0 ? byLogit : byLogit.slice(0, sampling.topK);
  const total = candidates.reduce((sum, id) => sum + weights[id]!, 0);
  const kept = new Set<number>();
  let mass = 0;
  for (const id of candidates) {
    if (sampling.topP < 1 && mass >= total * sampling.topP * (1 + doubt)) break;
    kept.add(id);
    mass += weights[id]!;
  }
  return weights.map((weight, id) => (kept.has(id) && weight >= sampling.minP * (1 + doubt) ? weight : 0));
}

/** Tokens that kvs_sample may choose: one, or two where the draw lies on a border. */
export function rightTokens(row: SampledRow, sampling: RowSampling): Set<number> {
  const logits = changedLogits(row, sampling);
  if (sampling.temperature === 0) {
    const most = Math.max(...logits);
    return new Set(logits.flatMap((logit, id) => (most - logit <= DOUBT * Math.abs(most) ? [id] : [])));
  }
  const uniform = (philox(sampling.seed, row.rngPosition) >>> 8) * 2 ** -24;
  const right = new Set<number>();
  for (const doubt of [-DOUBT, 0, DOUBT]) {
    const weights = keptWeights(logits, sampling, doubt);
    for (const shift of [-DOUBT, 0, DOUBT]) right.add(drawn(weights, uniform + shift));
  }
  return right;
}

function drawn(weights: readonly number[], uniform: number): number {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  let sum = 0;
  let last = 0;
  for (const [id, weight] of weights.entries()) {
    if (weight === 0) continue;
    sum += weight;
    last = id;
    if (sum > uniform * total) break;
  }
  return last;
}
