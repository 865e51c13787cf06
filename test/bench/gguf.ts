// Writes a Llama model as GGUF (version 3, bf16 matrices, no tokenizer), so that llama.cpp can be given the same work:
// https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

import { closeSync, openSync, writeSync } from "node:fs";
import type { GatedConfig } from "../../sidecar/model/model-config.ts";
import { readTensor, type SafetensorsFile } from "../../sidecar/model/safetensors.ts";

const ALIGNMENT = 32;
const F32 = 0;
const BF16 = 30;

interface Tensor {
  readonly name: string;
  /** Rows and columns, or the length of a vector. */
  readonly shape: readonly number[];
  readonly data: () => Uint8Array;
}

/** weights: a checkpoint with bf16 matrices, or null for random ones. */
export function writeGguf(path: string, config: GatedConfig, weights: SafetensorsFile | null): void {
  const tensors = listTensors(config, weights);
  const file = openSync(path, "w");
  const header = new Writer();
  header.bytes(Buffer.from("GGUF"));
  header.u32(3);
  header.u64(tensors.length);
  const entries = metadata(config);
  header.u64(entries.length);
  for (const [key, value] of entries) header.entry(key, value);
  let offset = 0;
  for (const { name, shape } of tensors) {
    header.text(name);
    header.u32(shape.length);
    for (const size of shape.toReversed()) header.u64(size);
    header.u32(shape.length === 1 ? F32 : BF16);
    header.u64(offset);
    offset += aligned(byteSize(shape));
  }
  let at = write(file, header.taken(), 0);
  for (const { data } of tensors) at = write(file, data(), at);
  closeSync(file);
}

function metadata(config: GatedConfig): (readonly [string, string | number | { float: number }])[] {
  return [
    ["general.architecture", "llama"],
    ["general.alignment", ALIGNMENT],
    ["llama.vocab_size", config.vocabSize],
    ["llama.context_length", config.maxPositions],
    ["llama.embedding_length", config.hiddenSize],
    ["llama.block_count", config.layers],
    ["llama.feed_forward_length", config.intermediateSize],
    ["llama.attention.head_count", config.heads],
    ["llama.attention.head_count_kv", config.kvHeads],
    ["llama.attention.key_length", config.headDim],
    ["llama.attention.value_length", config.headDim],
    ["llama.attention.layer_norm_rms_epsilon", { float: config.normEpsilon }],
    ["llama.rope.dimension_count", config.headDim],
    ["llama.rope.freq_base", { float: 10000 }],
    ["tokenizer.ggml.model", "no_vocab"],
  ];
}

function listTensors(config: GatedConfig, weights: SafetensorsFile | null): Tensor[] {
  const { hiddenSize, intermediateSize, vocabSize, heads, kvHeads, headDim } = config;
  const tensor = (name: string, source: string, shape: readonly number[], turnedHeads = 0): Tensor => ({
    name,
    shape,
    data: () => (weights === null ? made(shape) : stored(weights, source, shape, turnedHeads)),
  });
  const layers = Array.from({ length: config.layers }, (_, layer) => {
    const [to, from] = [`blk.${layer}`, `model.layers.${layer}`];
    return [
      tensor(`${to}.attn_norm.weight`, `${from}.input_layernorm.weight`, [hiddenSize]),
      tensor(`${to}.attn_q.weight`, `${from}.self_attn.q_proj.weight`, [heads * headDim, hiddenSize], heads),
      tensor(`${to}.attn_k.weight`, `${from}.self_attn.k_proj.weight`, [kvHeads * headDim, hiddenSize], kvHeads),
      tensor(`${to}.attn_v.weight`, `${from}.self_attn.v_proj.weight`, [kvHeads * headDim, hiddenSize]),
      tensor(`${to}.attn_output.weight`, `${from}.self_attn.o_proj.weight`, [hiddenSize, heads * headDim]),
      tensor(`${to}.ffn_norm.weight`, `${from}.post_attention_layernorm.weight`, [hiddenSize]),
      tensor(`${to}.ffn_gate.weight`, `${from}.mlp.gate_proj.weight`, [intermediateSize, hiddenSize]),
      tensor(`${to}.ffn_up.weight`, `${from}.mlp.up_proj.weight`, [intermediateSize, hiddenSize]),
      tensor(`${to}.ffn_down.weight`, `${from}.mlp.down_proj.weight`, [hiddenSize, intermediateSize]),
    ];
  }).flat();
  return [
    tensor("token_embd.weight", "model.embed_tokens.weight", [vocabSize, hiddenSize]),
    tensor("output_norm.weight", "model.norm.weight", [hiddenSize]),
    ...layers,
  ];
}

/** turnedHeads: llama.cpp rotates neighbours, the checkpoint halves: rows of each head change places. */
function stored(weights: SafetensorsFile, name: string, shape: readonly number[], turnedHeads: number): Uint8Array {
  const info = weights.tensors.get(name)!;
  if (shape.length === 1) return new Uint8Array(Float32Array.from(readTensor(weights, info)).buffer);
  const bytes = new Uint8Array(byteSize(shape));
  weights.read(info, 0, bytes);
  if (turnedHeads === 0) return bytes;
  const rowBytes = 2 * shape[1]!;
  const headDim = shape[0]! / turnedHeads;
  const turned = new Uint8Array(bytes.length);
  for (let row = 0; row < shape[0]!; row++) {
    const [head, at] = [Math.floor(row / headDim), row % headDim];
    const from = head * headDim + (at % 2) * (headDim / 2) + Math.floor(at / 2);
    turned.set(bytes.subarray(from * rowBytes, (from + 1) * rowBytes), row * rowBytes);
  }
  return turned;
}

/** Norms 1, matrices within +-0.03, without zeros or subnormals. */
function made(shape: readonly number[]): Uint8Array {
  if (shape.length === 1) return new Uint8Array(new Float32Array(shape[0]!).fill(1).buffer);
  const words = new Uint32Array(byteSize(shape) / 4);
  let state = 12345;
  for (let i = 0; i < words.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    // Two bf16: exponent of 2^-6 (0x3C00) and below, sign and fraction at random.
    words[i] = (state & 0x80ff80ff) | 0x3c003c00;
  }
  return new Uint8Array(words.buffer);
}

function byteSize(shape: readonly number[]): number {
  return shape.length === 1 ? 4 * shape[0]! : 2 * shape[0]! * shape[1]!;
}

function aligned(bytes: number): number {
  return Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;
}

/** Writes the bytes at `at`, padded; returns where the next ones go. */
function write(file: number, bytes: Uint8Array, at: number): number {
  let done = 0;
  while (done < bytes.length) done += writeSync(file, bytes, done, bytes.length - done, at + done);
  const padding = new Uint8Array(aligned(bytes.length) - bytes.length);
  if (padding.length > 0) writeSync(file, padding, 0, padding.length, at + bytes.length);
  return at + aligned(bytes.length);
}

class Writer {
  readonly #parts: Uint8Array[] = [];

  bytes(bytes: Uint8Array): void {
    this.#parts.push(bytes);
  }

  u32(value: number): void {
    this.bytes(new Uint8Array(Uint32Array.of(value).buffer));
  }

  u64(value: number): void {
    this.bytes(new Uint8Array(BigUint64Array.of(BigInt(value)).buffer));
  }

  text(text: string): void {
    const bytes = Buffer.from(text);
    this.u64(bytes.length);
    this.bytes(bytes);
  }

  entry(key: string, value: string | number | { float: number }): void {
    this.text(key);
    if (typeof value === "string") {
      this.u32(8);
      this.text(value);
    } else if (typeof value === "number") {
      this.u32(4);
      this.u32(value);
    } else {
      this.u32(6);
      this.bytes(new Uint8Array(Float32Array.of(value.float).buffer));
    }
  }

  taken(): Uint8Array {
    return Buffer.concat(this.#parts);
  }
}
