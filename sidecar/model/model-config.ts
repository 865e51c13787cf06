// What config.json says about a model, as one frozen object, and the readers that families share. They know
// the old spelling of fields and the new one (transformers 5), and refuse by name what a forward pass would
// get silently wrong.

import type { JsonFields } from "./json-fields.ts";
import { readRope, type Rope } from "./rope.ts";

export type WeightDtype = "f32" | "f16" | "bf16";

/** What every family has. */
export interface BaseConfig {
  /** config.json, for messages. */
  readonly file: string;
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Context that the model was made for, in tokens. */
  readonly maxPositions: number;
  readonly normEpsilon: number;
  /** The embedding is the output matrix too. */
  readonly isTied: boolean;
  /** As config.json says; the weights' own dtype decides. */
  readonly dtype: WeightDtype;
  /** Null: ALiBi. */
  readonly rope: Rope | null;
  /** Per layer: how many positions back attention reaches, itself included; 0: all. */
  readonly windows: readonly number[];
}

/** RMS norm before attention and before a gated SiLU MLP. */
export interface GatedConfig extends BaseConfig {
  readonly family: "llama" | "mistral" | "qwen2" | "qwen3";
  readonly hasQkvBias: boolean;
  readonly hasAttentionOutputBias: boolean;
  readonly hasMlpBias: boolean;
  /** Heads of q and k are RMS-normed before RoPE. */
  readonly hasQkNorm: boolean;
}

/** Layer norm, fused query_key_value, GELU MLP, mostly beside attention instead of after it. */
export interface FalconConfig extends BaseConfig {
  readonly family: "falcon";
  readonly hasBias: boolean;
  /** "parallel1": one norm for attention and MLP; "parallel2": one each; "sequential": MLP after
   * attention. */
  readonly layout: "parallel1" | "parallel2" | "sequential";
}

export type ModelConfig = GatedConfig | FalconConfig;

/** The fields that Llama named and its followers kept; windows are all 0. Throws ModelError. */
export function readGatedBase(fields: JsonFields): BaseConfig {
  const activation = fields.text("hidden_act", "silu");
  if (activation !== "silu") fields.refuse("hidden_act", `"${activation}" is not supported (silu is)`);
  const hiddenSize = fields.count("hidden_size");
  const layers = fields.count("num_hidden_layers");
  const heads = fields.count("num_attention_heads");
  const kvHeads = fields.count("num_key_value_heads", heads);
  const headDim = headDimOf(fields, hiddenSize, heads, kvHeads);
  return {
    file: fields.file,
    vocabSize: fields.count("vocab_size"),
    hiddenSize,
    intermediateSize: fields.count("intermediate_size"),
    layers,
    heads,
    kvHeads,
    headDim,
    maxPositions: fields.count("max_position_embeddings", 2048),
    normEpsilon: fields.positive("rms_norm_eps", 1e-6),
    isTied: fields.flag("tie_word_embeddings", false),
    dtype: readDtype(fields),
    rope: readRope(fields, headDim),
    windows: new Array<number>(layers).fill(0),
  };
}

export function headDimOf(fields: JsonFields, hiddenSize: number, heads: number, kvHeads: number): number {
  if (heads % kvHeads !== 0) {
    fields.refuse("num_attention_heads", `${heads} heads do not share ${kvHeads} key-value heads evenly`);
  }
  if (fields.has("head_dim")) {
    const headDim = fields.count("head_dim");
    if (headDim % 2 !== 0) fields.refuse("head_dim", `must be even, not ${headDim}`);
    return headDim;
  }
  if (hiddenSize % (2 * heads) !== 0) {
    fields.refuse("hidden_size", `${hiddenSize} is not an even number of dims for each of ${heads} heads`);
  }
  return hiddenSize / heads;
}

/** Qwen: the lower max_window_layers layers see everything, those above a window. */
export function readQwenWindows(fields: JsonFields, layers: number): number[] {
  const isOn = fields.flag("use_sliding_window", false);
  const window = isOn && fields.has("sliding_window") ? fields.count("sliding_window") : 0;
  return readWindows(fields, layers, window, fields.count("max_window_layers", 28, 0));
}

/** layer_types decides where it is given; else layers from `firstWindowed` on have the window. */
export function readWindows(
  fields: JsonFields,
  layers: number,
  window: number,
  firstWindowed: number,
): number[] {
  const types = fields.texts("layer_types");
  if (types === null) {
    return Array.from({ length: layers }, (_, layer) => (layer >= firstWindowed ? window : 0));
  }
  if (types.length !== layers) {
    fields.refuse("layer_types", `has ${types.length} entries for ${layers} layers`);
  }
  return types.map((type) => {
    if (type === "full_attention") return 0;
    if (type !== "sliding_attention") fields.refuse("layer_types", `"${type}" is not supported`);
    if (window === 0) fields.refuse("layer_types", "has sliding_attention, but there is no sliding_window");
    return window;
  });
}

const DTYPES: Readonly<Record<string, WeightDtype>> = {
  float32: "f32",
  float16: "f16",
  bfloat16: "bf16",
};

export function readDtype(fields: JsonFields): WeightDtype {
  const field = fields.has("dtype") ? "dtype" : "torch_dtype";
  const name = fields.text(field, "bfloat16").replace(/^torch\./, "");
  const dtype = DTYPES[name];
  if (dtype === undefined) {
    fields.refuse(field, `"${name}" is not supported (${Object.keys(DTYPES).join(", ")} are)`);
  }
  return dtype;
}
