// Falcon: layer norms, one fused query_key_value matrix, a GELU MLP that mostly runs beside attention on the
// same residual. 7B shares one key-value head (multi-query) and one norm; 40B groups heads and norms
// attention and MLP apart; the RW versions use ALiBi, and some run the MLP after attention.

import { type DeviceAddress, NO_ADDRESS, type WeightHandle } from "../native.ts";
import type { AttentionWeights, Decoder, Family, PlainMlpWeights, Step } from "./decoder.ts";
import { JsonFields } from "./json-fields.ts";
import { type FalconConfig, headDimOf, readDtype } from "./model-config.ts";
import { readRope } from "./rope.ts";
import { type RowRange, type WeightSource, wholeTensor } from "./weights.ts";

export const falcon: Family<FalconConfig> = {
  readConfig,
  load: (config, source) => new Falcon(config, source),
};

interface LayerNormWeights {
  readonly weight: DeviceAddress;
  readonly bias: DeviceAddress;
}

interface FalconLayer {
  readonly attentionNorm: LayerNormWeights;
  readonly attention: AttentionWeights;
  /** Null: the MLP takes what attention takes. */
  readonly mlpNorm: LayerNormWeights | null;
  readonly mlp: PlainMlpWeights;
}

class Falcon implements Decoder {
  readonly embedding: WeightHandle;
  readonly outputMatrix: WeightHandle;
  readonly #layers: readonly FalconLayer[];
  readonly #finalNorm: LayerNormWeights;

  constructor(
    readonly config: FalconConfig,
    source: WeightSource,
  ) {
    const { vocabSize, hiddenSize } = config;
    this.embedding = source.vocabularyMatrix("transformer.word_embeddings.weight", vocabSize, hiddenSize);
    this.#layers = Array.from({ length: config.layers }, (_, layer) =>
      loadLayer(config, source, `transformer.h.${layer}`),
    );
    this.#finalNorm = loadNorm(config, source, "transformer.ln_f");
    this.outputMatrix = config.isTied
      ? this.embedding
      : source.vocabularyMatrix("lm_head.weight", vocabSize, hiddenSize);
  }

  forwardLayer(index: number, step: Step): void {
    const layer = this.#layers[index]!;
    const { hidden, normed, normedForMlp } = step;
    step.layerNorm(normed, hidden, layer.attentionNorm);
    if (this.config.layout === "sequential") {
      step.addAttention(index, normed, layer.attention);
      step.layerNorm(normed, hidden, layer.mlpNorm!);
      step.addGeluMlp(normed, layer.mlp);
      return;
    }
    // Both norms read the residual before attention is added to it.
    if (layer.mlpNorm !== null) step.layerNorm(normedForMlp, hidden, layer.mlpNorm);
    step.addAttention(index, normed, layer.attention);
    step.addGeluMlp(layer.mlpNorm === null ? normed : normedForMlp, layer.mlp);
  }

  finalNorm(step: Step, y: DeviceAddress, x: DeviceAddress, rowCount: number): void {
    step.layerNorm(y, x, this.#finalNorm, rowCount);
  }
}

function loadLayer(config: FalconConfig, source: WeightSource, at: string): FalconLayer {
  const { heads, headDim, hiddenSize, intermediateSize, hasBias } = config;
  const matrix = (name: string, rows: number, cols: number): WeightHandle =>
    source.matrix([wholeTensor(`${at}.${name}.weight`, rows)], cols);
  const bias = (name: string, rows: number): DeviceAddress =>
    hasBias ? source.vector([wholeTensor(`${at}.${name}.bias`, rows)], "bias") : NO_ADDRESS;
  const qkvRows = (suffix: string): RowRange[] =>
    splitQkvRows(config, `${at}.self_attention.query_key_value.${suffix}`);
  return {
    ...loadNorms(config, source, at),
    attention: {
      qkv: source.matrix(qkvRows("weight"), hiddenSize),
      qkvBias: hasBias ? source.vector(qkvRows("bias"), "bias") : NO_ADDRESS,
      qNorm: NO_ADDRESS,
      kNorm: NO_ADDRESS,
      output: matrix("self_attention.dense", hiddenSize, heads * headDim),
      outputBias: bias("self_attention.dense", hiddenSize),
    },
    mlp: {
      up: matrix("mlp.dense_h_to_4h", intermediateSize, hiddenSize),
      upBias: bias("mlp.dense_h_to_4h", intermediateSize),
      down: matrix("mlp.dense_4h_to_h", hiddenSize, intermediateSize),
      downBias: bias("mlp.dense_4h_to_h", hiddenSize),
    },
  };
}

function loadNorms(
  config: FalconConfig,
  source: WeightSource,
  at: string,
): { attentionNorm: LayerNormWeights; mlpNorm: LayerNormWeights | null } {
  const norm = (name: string): LayerNormWeights => loadNorm(config, source, `${at}.${name}`);
  switch (config.layout) {
    case "parallel1":
      return { attentionNorm: norm("input_layernorm"), mlpNorm: null };
    case "parallel2":
      return { attentionNorm: norm("ln_attn"), mlpNorm: norm("ln_mlp") };
    case "sequential":
      return { attentionNorm: norm("input_layernorm"), mlpNorm: norm("post_attention_layernorm") };
  }
}

function loadNorm({ hiddenSize }: FalconConfig, source: WeightSource, at: string): LayerNormWeights {
  return {
    weight: source.vector([wholeTensor(`${at}.weight`, hiddenSize)], "norm"),
    bias: source.vector([wholeTensor(`${at}.bias`, hiddenSize)], "bias"),
  };
}

/** The fused tensor holds, for each key-value head, its query heads, then k, then v; attention wants all
 * q, all k, all v. */
function splitQkvRows({ heads, kvHeads, headDim }: FalconConfig, tensor: string): RowRange[] {
  const queriesPerGroup = heads / kvHeads;
  const groupHeads = queriesPerGroup + 2;
  const tensorRows = kvHeads * groupHeads * headDim;
  const ofEachGroup = (firstHead: number, headCount: number): RowRange[] =>
    Array.from({ length: kvHeads }, (_, group) => ({
      tensor,
      tensorRows,
      begin: (group * groupHeads + firstHead) * headDim,
      count: headCount * headDim,
    }));
  return [
    ...ofEachGroup(0, queriesPerGroup),
    ...ofEachGroup(queriesPerGroup, 1),
    ...ofEachGroup(queriesPerGroup + 1, 1),
  ];
}

function readConfig(original: JsonFields): FalconConfig {
  // The first Falcon releases used the names of their own code.
  const { n_layer, n_head, n_head_kv, ...rest } = original.values;
  const fields = new JsonFields(original.file, {
    num_hidden_layers: n_layer,
    num_attention_heads: n_head,
    num_kv_heads: n_head_kv,
    ...rest,
  });
  const activation = fields.text("activation", "gelu");
  if (activation !== "gelu") fields.refuse("activation", `"${activation}" is not supported (gelu is)`);
  const hiddenSize = fields.count("hidden_size");
  const layers = fields.count("num_hidden_layers");
  const heads = fields.count("num_attention_heads");
  const isGrouped = fields.flag("new_decoder_architecture", false);
  const ungroupedKvHeads = fields.flag("multi_query", true) ? 1 : heads;
  const kvHeads = isGrouped ? fields.count("num_kv_heads", heads) : ungroupedKvHeads;
  const headDim = headDimOf(fields, hiddenSize, heads, kvHeads);
  return {
    family: "falcon",
    file: fields.file,
    vocabSize: fields.count("vocab_size"),
    hiddenSize,
    intermediateSize: fields.count("ffn_hidden_size", 4 * hiddenSize),
    layers,
    heads,
    kvHeads,
    headDim,
    maxPositions: fields.count("max_position_embeddings", 2048),
    normEpsilon: fields.positive("layer_norm_epsilon", 1e-5),
    isTied: fields.flag("tie_word_embeddings", true),
    dtype: readDtype(fields),
    rope: fields.flag("alibi", false) ? null : readRope(fields, headDim),
    windows: new Array<number>(layers).fill(0),
    hasBias: fields.flag("bias", false),
    layout: readLayout(fields, isGrouped),
  };
}

function readLayout(fields: JsonFields, isGrouped: boolean): FalconConfig["layout"] {
  const isParallel = fields.flag("parallel_attn", true);
  const normCount = fields.count("num_ln_in_parallel_attn", isGrouped ? 2 : 1);
  if (normCount > 2) fields.refuse("num_ln_in_parallel_attn", `must be 1 or 2, not ${normCount}`);
  if (!isParallel) {
    if (isGrouped) fields.refuse("parallel_attn", "must be true with new_decoder_architecture");
    return "sequential";
  }
  return isGrouped && normCount === 2 ? "parallel2" : "parallel1";
}
