// Puts a model's weights on the device. Everything is checked against the files before the first byte is
// uploaded, so that a broken checkpoint is refused at once and not after minutes.

import { type Device, DTYPE_BYTES, type NativeLibrary } from "../native.ts";
import { loadDecoder } from "./architecture.ts";
import type { Decoder } from "./decoder.ts";
import type { ModelConfig, WeightDtype } from "./model-config.ts";
import { ModelError } from "./model-error.ts";
import { type FileRange, ReadAhead } from "./read-ahead.ts";
import type { Checkpoint } from "./safetensors.ts";
import { CheckpointWeights, type MatrixStorage, RandomWeights, WeightCheck } from "./weights.ts";

type Say = (message: string) => void;

export interface CheckedWeights {
  readonly checkpoint: Checkpoint;
  /** As stored in the files. */
  readonly bytes: number;
  /** Of the embedding and the output matrix alone. */
  readonly vocabularyBytes: number;
  /** What will be read, in order. */
  readonly ranges: readonly FileRange[];
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
  const { bytes, vocabularyBytes, ranges, firstDtype: dtype } = check;
  return { checkpoint, bytes, vocabularyBytes, ranges, dtype };
}

/** Throws ModelError, NativeError. */
export function uploadWeights(
  library: NativeLibrary,
  device: Device,
  config: ModelConfig,
  checked: CheckedWeights,
  storage: MatrixStorage,
  say: Say,
): LoadedWeights {
  const { checkpoint, bytes } = checked;
  const neededBytes = bytesOnDevice(checked, storage);
  const { freeBytes } = device.memoryInfo();
  if (neededBytes > freeBytes) {
    const [needed, free] = [gibibytes(neededBytes), gibibytes(freeBytes)];
    const reason = `the weights are ${needed}, but only ${free} of memory are free`;
    throw new ModelError(checkpoint.listing, "", reason);
  }
  const readAhead = new ReadAhead(checked.ranges, (...range) => library.readAhead(...range));
  readAhead.advance(0);
  let doneBytes = 0;
  let saidTenths = 0;
  const source = new CheckpointWeights(device, checkpoint, storage, (added) => {
    doneBytes += added;
    readAhead.advance(added);
    const tenths = Math.floor((10 * doneBytes) / bytes);
    if (tenths === saidTenths || bytes < PROGRESS_BYTES_MIN) return;
    saidTenths = tenths;
    say(`loading weights: ${10 * tenths} % of ${gibibytes(bytes)}`);
  });
  const decoder = loadDecoder(config, source);
  return { decoder, hash: source.contentHash() };
}

/** Made-up weights of the config's shapes, the same every time. */
export function makeUpWeights(device: Device, config: ModelConfig, storage: MatrixStorage): LoadedWeights {
  const vocabulary = storage.vocabulary ?? config.dtype;
  const layers = storage.layers ?? config.dtype;
  const decoder = loadDecoder(config, new RandomWeights(device, { layers, vocabulary }, RANDOM_SEED));
  return { decoder, hash: `random ${RANDOM_SEED} ${vocabulary}` };
}

function bytesOnDevice({ bytes, vocabularyBytes, dtype }: CheckedWeights, storage: MatrixStorage): number {
  const layerValues = (bytes - vocabularyBytes) / DTYPE_BYTES[dtype];
  const vocabularyValues = vocabularyBytes / DTYPE_BYTES[dtype];
  return (
    layerValues * DTYPE_BYTES[storage.layers ?? dtype] + vocabularyValues * DTYPE_BYTES[storage.vocabulary ?? dtype]
  );
}

/** Buffers that old checkpoints stored, and the second copy of a tied matrix. */
function isHarmless(name: string, config: ModelConfig): boolean {
  return name.endsWith("rotary_emb.inv_freq") || (config.isTied && name === "lm_head.weight");
}

function gibibytes(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(2)} GiB`;
}
