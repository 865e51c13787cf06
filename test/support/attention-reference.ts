// Attention over a paged view in doubles: what kvs_append_kv and kvs_attention (native/kvasir.h) promise.

export interface AttentionShape {
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly rotaryDim: number;
  readonly blockTokens: number;
  readonly scale: number;
  /** Radians per position of each rotated pair. */
  readonly frequencies: ArrayLike<number>;
  /** By head; null: none. */
  readonly alibi: ArrayLike<number> | null;
}

/** R(position) x of one head. */
export function rotated(shape: AttentionShape, x: ArrayLike<number>, position: number): number[] {
  const y = Array.from(x);
  const pairs = shape.rotaryDim / 2;
  for (let i = 0; i < pairs; i++) {
    const [sine, cosine] = [Math.sin(position * shape.frequencies[i]!), Math.cos(position * shape.frequencies[i]!)];
    y[i] = x[i]! * cosine - x[i + pairs]! * sine;
    y[i + pairs] = x[i + pairs]! * cosine + x[i]! * sine;
  }
  return y;
}

/** Keys of a block lie turned by their offset in it; both (kvHeads, blockTokens, headDim), K before V. */
export type Block = Float32Array;

/** One head's output for the query of `position`. window 0: all positions up to its own. */
export function attended(
  shape: AttentionShape,
  q: ArrayLike<number>,
  head: number,
  position: number,
  window: number,
  blocks: readonly Block[],
): number[] {
  const { headDim, blockTokens, kvHeads } = shape;
  const kvHead = Math.floor(head / (shape.heads / kvHeads));
  const first = window === 0 ? 0 : Math.max(0, position - window + 1);
  const scores: number[] = [];
  const values: Float32Array[] = [];
  for (let at = first; at <= position; at++) {
    const offset = at % blockTokens;
    const turned = rotated(shape, q, position - (at - offset));
    const block = blocks[Math.floor(at / blockTokens)]!;
    const key = (kvHead * blockTokens + offset) * headDim;
    let score = 0;
    for (let d = 0; d < headDim; d++) score += turned[d]! * block[key + d]!;
    scores.push(score * shape.scale + (shape.alibi?.[head] ?? 0) * (at - position));
    const value = key + kvHeads * blockTokens * headDim;
    values.push(block.subarray(value, value + headDim));
  }
  const most = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - most));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return Array.from({ length: headDim }, (_, d) =>
    weights.reduce((sum, weight, i) => sum + weight * values[i]![d]!, 0) / total,
  );
}
