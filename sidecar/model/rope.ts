// Rotary position embedding: the angle by which each pair of dims turns per position. Every supported scaling
// only changes these frequencies, so keys can be stored relative to their block whatever the model.

import type { JsonFields } from "./json-fields.ts";

export interface Rope {
  /** Leading dims of a head that turn, in pairs (i, i + rotaryDim / 2). */
  readonly rotaryDim: number;
  /** (rotaryDim / 2), radians per position. */
  readonly inverseFrequencies: Float64Array;
}

const DEFAULT_THETA = 10000;

/** Reads the new spelling (rope_parameters) and the old one (rope_theta, rope_scaling). Throws ModelError. */
export function readRope(config: JsonFields, headDim: number): Rope {
  const parameters = config.fields("rope_parameters");
  const scaling = parameters ?? config.fields("rope_scaling");
  const thetaFields = parameters?.has("rope_theta") ? parameters : config;
  const theta = thetaFields.positive("rope_theta", DEFAULT_THETA);
  const partial = config.positive("partial_rotary_factor", 1);
  const rotaryDim = 2 * Math.floor((headDim * partial) / 2);
  if (rotaryDim < 2 || rotaryDim > headDim) {
    config.refuse("partial_rotary_factor", `must leave 2 to ${headDim} dims to turn, not ${rotaryDim}`);
  }
  const plain = Float64Array.from(
    { length: rotaryDim / 2 },
    (_, pair) => theta ** ((-2 * pair) / rotaryDim),
  );
  return { rotaryDim, inverseFrequencies: scaling === null ? plain : scaled(plain, scaling) };
}

function scaled(frequencies: Float64Array, scaling: JsonFields): Float64Array {
  // "type" is the older name of "rope_type".
  const field = scaling.has("rope_type") ? "rope_type" : "type";
  const type = scaling.text(field, "default");
  switch (type) {
    case "default":
      return frequencies;
    case "linear": {
      const factor = scaling.positive("factor");
      return frequencies.map((frequency) => frequency / factor);
    }
    case "llama3":
      return llama3Scaled(frequencies, scaling);
    default:
      return scaling.refuse(field, `"${type}" is not supported (default, linear and llama3 are)`);
  }
}

/** Llama 3.1: long wavelengths are stretched by `factor`, short ones stay, those between are blended. */
function llama3Scaled(frequencies: Float64Array, scaling: JsonFields): Float64Array {
  const factor = scaling.positive("factor");
  const lowFactor = scaling.positive("low_freq_factor");
  const highFactor = scaling.positive("high_freq_factor");
  const originalPositions = scaling.count("original_max_position_embeddings");
  if (highFactor <= lowFactor) {
    scaling.refuse("high_freq_factor", `must be above low_freq_factor ${lowFactor}`);
  }
  return frequencies.map((frequency) => {
    const turns = (originalPositions * frequency) / (2 * Math.PI);
    if (turns < lowFactor) return frequency / factor;
    if (turns > highFactor) return frequency;
    const kept = (turns - lowFactor) / (highFactor - lowFactor);
    return (1 - kept) * (frequency / factor) + kept * frequency;
  });
}

/** ALiBi slopes of `heads` heads (Press et al. 2022): a geometric series, with the odd terms of the next
 * one appended where the number of heads is not a power of two. */
export function alibiSlopes(heads: number): Float32Array {
  const powerOfTwo = 2 ** Math.floor(Math.log2(heads));
  return Float32Array.from({ length: heads }, (_, head) => {
    if (head < powerOfTwo) return 2 ** ((-8 * (head + 1)) / powerOfTwo);
    return 2 ** ((-4 * (2 * (head - powerOfTwo) + 1)) / powerOfTwo);
  });
}
