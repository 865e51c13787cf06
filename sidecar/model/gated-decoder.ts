// The decoder of Llama, which Mistral and Qwen took over with small changes: RMS norm, attention, RMS norm,
// gated MLP.

import { type DeviceAddress, NO_ADDRESS, type WeightHandle } from "../native.ts";
import type { AttentionWeights, Decoder, GatedMlpWeights, Step } from "./decoder.ts";
import type { GatedConfig } from "./model-config.ts";
import { type RowRange, type WeightSource, wholeTensor } from "./weights.ts";

interface GatedLayer {
  readonly attentionNorm: DeviceAddress;
  readonly attention: AttentionWeights;
  readonly mlpNorm: DeviceAddress;
  readonly mlp: GatedMlpWeights;
}

export class GatedDecoder implements Decoder {
  readonly embedding: WeightHandle;
  readonly outputMatrix: WeightHandle;
  readonly #layers: readonly GatedLayer[];
  readonly #finalNorm: DeviceAddress;

  /** Throws ModelError when the source lacks a tensor. */
  constructor(config: GatedConfig, source: WeightSource) {
    const { vocabSize, hiddenSize } = config;
    const norm = (tensor: string): DeviceAddress => source.vector([wholeTensor(tensor, hiddenSize)], "norm");
    this.embedding = source.vocabularyMatrix("model.embed_tokens.weight", vocabSize, hiddenSize);
    this.#layers = Array.from({ length: config.layers }, (_, layer) => {
      const at = `model.layers.${layer}`;
      return {
        attentionNorm: norm(`${at}.input_layernorm.weight`),
        attention: loadAttention(config, source, `${at}.self_attn`),
        mlpNorm: norm(`${at}.post_attention_layernorm.weight`),
        mlp: loadMlp(config, source, `${at}.mlp`),
      };
    });
    this.#finalNorm = norm("model.norm.weight");
    this.outputMatrix = config.isTied
      ? this.embedding
      : source.vocabularyMatrix("lm_head.weight", vocabSize, hiddenSize);
  }

  forwardLayer(index: number, step: Step): void {
    const layer = this.#layers[index]!;
    const { hidden, normed } = step;
    step.rmsNorm(normed, hidden, layer.attentionNorm);
    step.addAttention(index, normed, layer.attention);
    step.rmsNorm(normed, hidden, layer.mlpNorm);
    step.addGatedMlp(normed, layer.mlp);
  }

  finalNorm(step: Step, y: DeviceAddress, x: DeviceAddress, rowCount: number): void {
    step.rmsNorm(y, x, this.#finalNorm, rowCount);
  }
}

function loadAttention(config: GatedConfig, source: WeightSource, at: string): AttentionWeights {
  const { heads, kvHeads, headDim, hiddenSize } = config;
  const qkvRows = (suffix: string): RowRange[] => [
    wholeTensor(`${at}.q_proj.${suffix}`, heads * headDim),
    wholeTensor(`${at}.k_proj.${suffix}`, kvHeads * headDim),
    wholeTensor(`${at}.v_proj.${suffix}`, kvHeads * headDim),
  ];
  const outputRows = (suffix: string): RowRange[] => [wholeTensor(`${at}.o_proj.${suffix}`, hiddenSize)];
  const headNorm = (name: string): DeviceAddress =>
    config.hasQkNorm ? source.vector([wholeTensor(`${at}.${name}.weight`, headDim)], "norm") : NO_ADDRESS;
  return {
    qkv: source.matrix(qkvRows("weight"), hiddenSize),
    qkvBias: config.hasQkvBias ? source.vector(qkvRows("bias"), "bias") : NO_ADDRESS,
    qNorm: headNorm("q_norm"),
    kNorm: headNorm("k_norm"),
    output: source.matrix(outputRows("weight"), heads * headDim),
    outputBias: config.hasAttentionOutputBias ? source.vector(outputRows("bias"), "bias") : NO_ADDRESS,
  };
}

function loadMlp(config: GatedConfig, source: WeightSource, at: string): GatedMlpWeights {
  const { hiddenSize, intermediateSize, hasMlpBias } = config;
  const gateUpRows = (suffix: string): RowRange[] => [
    wholeTensor(`${at}.gate_proj.${suffix}`, intermediateSize),
    wholeTensor(`${at}.up_proj.${suffix}`, intermediateSize),
  ];
  const downRows = (suffix: string): RowRange[] => [wholeTensor(`${at}.down_proj.${suffix}`, hiddenSize)];
  return {
    gateUp: source.matrix(gateUpRows("weight"), hiddenSize),
    gateUpBias: hasMlpBias ? source.vector(gateUpRows("bias"), "bias") : NO_ADDRESS,
    down: source.matrix(downRows("weight"), intermediateSize),
    downBias: hasMlpBias ? source.vector(downRows("bias"), "bias") : NO_ADDRESS,
  };
}
