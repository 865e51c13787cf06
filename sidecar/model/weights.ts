// Where a decoder's weights come from. A family names the tensors and shapes it wants, once; the same
// declaration is run against a check (is everything there, how many bytes?), then against the checkpoint or a
// random source, which put the weights on the device.

import { assert } from "../assert.ts";
import { type Device, type DeviceAddress, DTYPE_BYTES, type DType, NO_ADDRESS, type WeightHandle } from "../native.ts";
import type { WeightDtype } from "./model-config.ts";
import { ModelError } from "./model-error.ts";
import type { FileRange } from "./read-ahead.ts";
import { type Checkpoint, readTensor, type SafetensorsFile, type TensorInfo } from "./safetensors.ts";

/** Neighbouring rows of a tensor that has `tensorRows` of them. */
export interface RowRange {
  readonly tensor: string;
  readonly tensorRows: number;
  readonly begin: number;
  readonly count: number;
}

export function wholeTensor(tensor: string, rows: number): RowRange {
  return { tensor, tensorRows: rows, begin: 0, count: rows };
}

export interface WeightSource {
  /** A layer's matrix on the device: the parts' rows one below the other, each (cols) wide. */
  matrix(parts: readonly RowRange[], cols: number): WeightHandle;
  /** (vocab, hidden): the embedding, or the output matrix. Never quantised. */
  vocabularyMatrix(tensor: string, rows: number, cols: number): WeightHandle;
  /** An F32 vector on the device: the parts one after the other. kind: what made-up weights should be. */
  vector(parts: readonly RowRange[], kind: "norm" | "bias"): DeviceAddress;
}

/** How matrices are kept on the device; null: each as in its file. */
export interface MatrixStorage {
  /** Of the layers' matrices. */
  readonly layers: DType | null;
  readonly vocabulary: WeightDtype | null;
}

const DTYPES: Readonly<Record<string, WeightDtype>> = { F32: "f32", F16: "f16", BF16: "bf16" };

interface CheckpointTensor {
  readonly file: SafetensorsFile;
  readonly info: TensorInfo;
}

/** Finds what is missing or misshapen before anything is uploaded. Its handles stand for nothing. */
export class WeightCheck implements WeightSource {
  readonly #wanted = new Set<string>();
  /** What matrices are made of, in the order in which a checkpoint's upload will read it. */
  readonly ranges: FileRange[] = [];
  #bytes = 0;
  #vocabularyBytes = 0;
  /** Of the first tensor asked for, the embedding. */
  firstDtype: WeightDtype = "bf16";

  constructor(readonly checkpoint: Checkpoint) {}

  /** Of all wanted tensors, as stored. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Of the embedding and the output matrix alone, as stored. */
  get vocabularyBytes(): number {
    return this.#vocabularyBytes;
  }

  /** Tensors of the checkpoint that nobody asked for. */
  unused(): string[] {
    return [...this.checkpoint.names].filter((name) => !this.#wanted.has(name));
  }

  matrix(parts: readonly RowRange[], cols: number): WeightHandle {
    for (const part of parts) {
      const { file, info } = this.#check(part, [part.tensorRows, cols]);
      const rowBytes = (info.endByte - info.beginByte) / part.tensorRows;
      this.ranges.push(file.range(info, part.begin * rowBytes, (part.begin + part.count) * rowBytes));
    }
    return 0 as WeightHandle;
  }

  vocabularyMatrix(tensor: string, rows: number, cols: number): WeightHandle {
    const bytesBefore = this.#bytes;
    const handle = this.matrix([wholeTensor(tensor, rows)], cols);
    this.#vocabularyBytes += this.#bytes - bytesBefore;
    return handle;
  }

  vector(parts: readonly RowRange[]): DeviceAddress {
    for (const part of parts) this.#check(part, [part.tensorRows]);
    return NO_ADDRESS;
  }

  #check({ tensor, tensorRows, begin, count }: RowRange, shape: readonly number[]): CheckpointTensor {
    assert(begin + count <= tensorRows, `${tensor} has no rows ${begin} to ${begin + count}`);
    const { file, info } = this.checkpoint.get(tensor);
    const dtype = dtypeOf(file, info);
    if (this.#wanted.size === 0) this.firstDtype = dtype;
    if (info.shape.length !== shape.length || !shape.every((size, i) => size === info.shape[i])) {
      const reason = `has shape [${info.shape.join(", ")}], but config.json asks for [${shape.join(", ")}]`;
      throw new ModelError(file.path, tensor, reason);
    }
    if (!this.#wanted.has(tensor)) this.#bytes += info.endByte - info.beginByte;
    this.#wanted.add(tensor);
    return { file, info };
  }
}

/** Rows go through a buffer of this size (or of one row, if that is more). */
const STAGING_BYTES = 16 * 2 ** 20;

/** Reads a checked checkpoint, uploads it and hashes what it reads. */
export class CheckpointWeights implements WeightSource {
  readonly #hashes: string[] = [];
  #staging = new Uint8Array(STAGING_BYTES);

  constructor(
    readonly device: Device,
    readonly checkpoint: Checkpoint,
    readonly storage: MatrixStorage,
    readonly onBytes: (bytes: number) => void,
  ) {}

  /** Of the content of everything uploaded so far, in order. */
  contentHash(): string {
    return new Bun.CryptoHasher("sha256").update(this.#hashes.join("\n")).digest("hex");
  }

  matrix(parts: readonly RowRange[], cols: number): WeightHandle {
    return this.#place(parts, cols, this.storage.layers);
  }

  vocabularyMatrix(tensor: string, rows: number, cols: number): WeightHandle {
    return this.#place([wholeTensor(tensor, rows)], cols, this.storage.vocabulary);
  }

  vector(parts: readonly RowRange[]): DeviceAddress {
    const values = parts.map(({ tensor, begin, count }) => {
      const { file, info } = this.checkpoint.get(tensor);
      const whole = readTensor(file, info);
      this.#note(tensor, Bun.hash.wyhash(new Uint8Array(whole.buffer)));
      return whole.subarray(begin, begin + count);
    });
    const joined = new Float32Array(values.reduce((sum, { length }) => sum + length, 0));
    let at = 0;
    for (const value of values) {
      joined.set(value, at);
      at += value.length;
    }
    return placeVector(this.device, joined);
  }

  #place(parts: readonly RowRange[], cols: number, storage: DType | null): WeightHandle {
    const rows = parts.reduce((sum, { count }) => sum + count, 0);
    const first = this.checkpoint.get(parts[0]!.tensor);
    const weight = this.device.createWeight(rows, cols, storage ?? dtypeOf(first.file, first.info));
    let rowBegin = 0;
    for (const part of parts) {
      this.#upload(weight, rowBegin, part, cols);
      rowBegin += part.count;
    }
    return weight;
  }

  #upload(weight: WeightHandle, rowBegin: number, part: RowRange, cols: number): void {
    const { file, info } = this.checkpoint.get(part.tensor);
    const sourceDtype = dtypeOf(file, info);
    const rowBytes = cols * DTYPE_BYTES[sourceDtype];
    if (rowBytes > this.#staging.length) this.#staging = new Uint8Array(rowBytes);
    const rowsAtOnce = Math.floor(this.#staging.length / rowBytes);
    let hash = 0n;
    for (let done = 0; done < part.count; done += rowsAtOnce) {
      const rowCount = Math.min(rowsAtOnce, part.count - done);
      const source = this.#staging.subarray(0, rowCount * rowBytes);
      file.read(info, (part.begin + done) * rowBytes, source);
      hash = Bun.hash.wyhash(source, hash);
      this.device.uploadWeight({ weight, rowBegin: rowBegin + done, rowCount, source, sourceDtype });
      this.onBytes(source.length);
    }
    this.#note(`${part.tensor} ${info.dtype} [${info.shape.join()}] ${part.begin}+${part.count}`, hash);
  }

  #note(what: string, hash: bigint): void {
    this.#hashes.push(`${what} ${hash.toString(16)}`);
  }
}

/** Standard deviation of made-up weights: the usual initialisation. */
const RANDOM_DEVIATION = 0.02;

/** Made-up weights for speed tests of any shape: matrices uniform, norms 1, biases 0. */
export class RandomWeights implements WeightSource {
  #seed: number;

  constructor(
    readonly device: Device,
    readonly storage: { readonly layers: DType; readonly vocabulary: WeightDtype },
    seed: number,
  ) {
    this.#seed = seed;
  }

  matrix(parts: readonly RowRange[], cols: number): WeightHandle {
    return this.#make(parts.reduce((sum, { count }) => sum + count, 0), cols, this.storage.layers);
  }

  vocabularyMatrix(_tensor: string, rows: number, cols: number): WeightHandle {
    return this.#make(rows, cols, this.storage.vocabulary);
  }

  vector(parts: readonly RowRange[], kind: "norm" | "bias"): DeviceAddress {
    const length = parts.reduce((sum, { count }) => sum + count, 0);
    return placeVector(this.device, new Float32Array(length).fill(kind === "norm" ? 1 : 0));
  }

  #make(rows: number, cols: number, dtype: DType): WeightHandle {
    const weight = this.device.createWeight(rows, cols, dtype);
    this.device.fillWeightRandom(weight, this.#seed++, RANDOM_DEVIATION);
    return weight;
  }
}

function placeVector(device: Device, values: Float32Array): DeviceAddress {
  const address = device.alloc(values.byteLength);
  device.copyIn(address, values);
  return address;
}

function dtypeOf(file: SafetensorsFile, info: TensorInfo): WeightDtype {
  const dtype = DTYPES[info.dtype];
  if (dtype === undefined) {
    const reason = `dtype ${info.dtype} is not supported (F32, F16 and BF16 are)`;
    throw new ModelError(file.path, info.name, reason);
  }
  return dtype;
}
