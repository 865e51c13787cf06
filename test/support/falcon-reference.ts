// Falcon, computed plainly in double precision from the files of a model directory: an oracle for what has no
// golden of the reference implementation (ALiBi, biases, ungrouped heads, the MLP after attention). Reads
// config.json by itself.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Checkpoint, readTensor } from "../../sidecar/model/safetensors.ts";

export type Vector = Float64Array<ArrayBufferLike>;

interface FalconValues {
  readonly hidden_size: number;
  readonly num_hidden_layers: number;
  readonly num_attention_heads: number;
  readonly num_kv_heads?: number;
  readonly new_decoder_architecture: boolean;
  readonly multi_query: boolean;
  readonly parallel_attn: boolean;
  readonly alibi: boolean;
  readonly bias: boolean;
}

/** Logits (tokens, vocab) of a prompt. */
export function falconReference(directory: string, ids: ArrayLike<number>): Vector[] {
  const config = JSON.parse(readFileSync(join(directory, "config.json"), "utf8")) as FalconValues;
  const checkpoint = new Checkpoint(directory);
  const tensor = (name: string): Vector => {
    const { file, info } = checkpoint.get(name);
    return Float64Array.from(readTensor(file, info));
  };
  const embedding = tensor("transformer.word_embeddings.weight");
  const size = config.hidden_size;
  let hidden: Vector[] = Array.from(ids, (id) => embedding.slice(id * size, (id + 1) * size));
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    hidden = decoderLayer(config, (name) => tensor(`transformer.h.${layer}.${name}`), hidden);
  }
  const [weight, bias] = [tensor("transformer.ln_f.weight"), tensor("transformer.ln_f.bias")];
  const normed = hidden.map((x) => layerNorm(x, weight, bias));
  checkpoint.close();
  return normed.map((x) => linear(x, embedding, null));
}

function decoderLayer(config: FalconValues, tensor: (name: string) => Vector, hidden: Vector[]): Vector[] {
  const norm = (x: Vector, name: string): Vector =>
    layerNorm(x, tensor(`${name}.weight`), tensor(`${name}.bias`));
  const project = (x: Vector, name: string): Vector =>
    linear(x, tensor(`${name}.weight`), config.bias ? tensor(`${name}.bias`) : null);
  const mlp = (x: Vector): Vector => project(project(x, "mlp.dense_h_to_4h").map(gelu), "mlp.dense_4h_to_h");
  const isGrouped = config.new_decoder_architecture;
  const attentionInput = hidden.map((x) => norm(x, isGrouped ? "ln_attn" : "input_layernorm"));
  const fused = attentionInput.map((x) => project(x, "self_attention.query_key_value"));
  const attended = attention(config, fused).map((x) => project(x, "self_attention.dense"));
  return hidden.map((x, row) => {
    const afterAttention = add(x, attended[row]!);
    if (!config.parallel_attn) {
      return add(afterAttention, mlp(norm(afterAttention, "post_attention_layernorm")));
    }
    return add(afterAttention, mlp(isGrouped ? norm(x, "ln_mlp") : attentionInput[row]!));
  });
}

function attention(config: FalconValues, fused: Vector[]): Vector[] {
  const heads = config.num_attention_heads;
  const headDim = config.hidden_size / heads;
  const ungrouped = config.multi_query ? 1 : heads;
  const groups = config.new_decoder_architecture ? config.num_kv_heads! : ungrouped;
  const perGroup = heads / groups;
  /** The fused row holds, group by group, the queries of its heads, a key and a value. */
  const part = (row: number, group: number, index: number): Vector => {
    const at = (group * (perGroup + 2) + index) * headDim;
    const raw = fused[row]!.slice(at, at + headDim);
    const isValue = index === perGroup + 1;
    return config.alibi || isValue ? raw : rotate(raw, row);
  };
  return fused.map((_, row) => {
    const out = new Float64Array(heads * headDim);
    for (let head = 0; head < heads; head++) {
      const group = Math.floor(head / perGroup);
      const query = part(row, group, head % perGroup);
      const scores = Array.from({ length: row + 1 }, (_unused, key) => {
        // ALiBi by the position of the key alone: softmax does not see the difference to the relative one.
        const bias = config.alibi ? slope(head, heads) * key : 0;
        return (dot(query, part(key, group, perGroup)) + bias) / Math.sqrt(headDim);
      });
      const peak = Math.max(...scores);
      const weights = scores.map((score) => Math.exp(score - peak));
      const total = weights.reduce((sum, weight) => sum + weight, 0);
      weights.forEach((weight, key) => {
        const value = part(key, group, perGroup + 1);
        for (let i = 0; i < headDim; i++) out[head * headDim + i]! += (weight / total) * value[i]!;
      });
    }
    return out;
  });
}

function slope(head: number, heads: number): number {
  if ((heads & (heads - 1)) !== 0) throw new Error("the reference knows powers of two");
  return 2 ** ((-8 * (head + 1)) / heads);
}

function rotate(x: Vector, position: number): Vector {
  const half = x.length / 2;
  return x.map((value, i) => {
    const angle = position * 10000 ** (-(i % half) / half);
    const partner = i < half ? -x[i + half]! : x[i - half]!;
    return value * Math.cos(angle) + partner * Math.sin(angle);
  });
}

function layerNorm(x: Vector, weight: Vector, bias: Vector): Vector {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  return x.map((value, i) => ((value - mean) / Math.sqrt(variance + 1e-5)) * weight[i]! + bias[i]!);
}

function linear(x: Vector, weight: Vector, bias: Vector | null): Vector {
  return Float64Array.from({ length: weight.length / x.length }, (_, row) => {
    let sum = bias?.[row] ?? 0;
    for (let i = 0; i < x.length; i++) sum += x[i]! * weight[row * x.length + i]!;
    return sum;
  });
}

function dot(a: Vector, b: Vector): number {
  return a.reduce((sum, value, i) => sum + value * b[i]!, 0);
}

function add(a: Vector, b: Vector): Vector {
  return a.map((value, i) => value + b[i]!);
}

function gelu(x: number): number {
  return 0.5 * x * (1 + erf(x / Math.SQRT2));
}

/** By its Taylor series, enough for |x| < 6; beyond, erf is 1 to double precision. */
function erf(x: number): number {
  if (Math.abs(x) > 5) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 1; n < 200; n++) {
    term *= -(x * x) / n;
    sum += term / (2 * n + 1);
  }
  return (2 / Math.sqrt(Math.PI)) * sum;
}
