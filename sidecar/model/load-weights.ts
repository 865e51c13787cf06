// Puts a model's weights on the device. Everything is checked against the files before the first byte is
// uploaded, so that a broken checkpoint is refused at once and not after minutes.

import type { Device } from "../native.ts";
import { loadDecoder } from "./architecture.ts";
import type { Decoder } from "./decoder.ts";
import type { ModelConfig, WeightDtype } from "./model-config.ts";
import { ModelError } from "./model-error.ts";
import type { Checkpoint } from "./safetensors.ts";
import { CheckpointWeights, RandomWeights, WEIGHT_DTYPE_BYTES, WeightCheck } from "./weights.ts";

type Say = (message: string) => void;

export interface CheckedWeights {
  readonly checkpoint: Checkpoint;
  /** As stored in the files. */
  readonly bytes: number;
  /** Of the embedding, which stands for all. */
  readonly dtype: WeightDtype;
}

export interface LoadedWeights {
  readonly decoder: Decoder;
  /** Of their content. */
  readonly hash: string;
}

/** Smaller models load before a line could be read. */
const PROGRESS_BYTES_MIN = 2 ** 29;
const RANDOM_SEED = 1;

/** Throws ModelError for a tensor that is missing, misshapen or of another dtype; tells of unused ones. */
export function checkWeights(config: ModelConfig, checkpoint: Checkpoint, say: Say): CheckedWeights {
  const check = new WeightCheck(checkpoint);
  loadDecoder(config, check);
  const unused = check.unused().filter((name) => !isHarmless(name, config));
  if (unused.length > 0) {
    const some = unused.slice(0, 3).join(", ") + (unused.length > 3 ? ", ..." : "");
    say(`tensors of the model that are not used: ${unused.length} (${some})`);
  }
  return { checkpoint, bytes: check.bytes, dtype: check.firstDtype };
}

/** storage: dtype of matrices on the device; null: as in the files. Throws ModelError, NativeError. */
export function uploadWeights(
  device: Device,
  config: ModelConfig,
  { checkpoint, bytes, dtype }: CheckedWeights,
  storage: WeightDtype | null,
  say: Say,
): LoadedWeights {
  const neededBytes = (bytes * WEIGHT_DTYPE_BYTES[storage ?? dtype]) / WEIGHT_DTYPE_BYTES[dtype];
  const { freeBytes } = device.memoryInfo();
  if (neededBytes > freeBytes) {
    const [needed, free] = [gibibytes(neededBytes), gibibytes(freeBytes)];
    const reason = `the weights are ${needed}, but only ${free} of memory are free`;
    throw new ModelError(checkpoint.listing, "", reason);
  }
  let doneBytes = 0;
  let saidTenths = 0;
  const source = new CheckpointWeights(device, checkpoint, storage, (added) => {
    doneBytes += added;
    const tenths = Math.floor((10 * doneBytes) / bytes);
    if (tenths === saidTenths || bytes < PROGRESS_BYTES_MIN) return;
    saidTenths = tenths;
    say(`loading weights: ${10 * tenths} % of ${gibibytes(bytes)}`);
  });
  const decoder = loadDecoder(config, source);
  return { decoder, hash: source.contentHash() };
}

/** Made-up weights of the config's shapes, the same every time. */
export function makeUpWeights(device: Device, config: ModelConfig, storage: WeightDtype): LoadedWeights {
  const decoder = loadDecoder(config, new RandomWeights(device, storage, RANDOM_SEED));
  return { decoder, hash: `random ${RANDOM_SEED} ${storage}` };
}

/** Buffers that old checkpoints stored, and the second copy of a tied matrix. */
function isHarmless(name: string, config: ModelConfig): boolean {
  return name.endsWith("rotary_emb.inv_freq") || (config.isTied && name === "lm_head.weight");
}

function gibibytes(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(2)} GiB`;
}
