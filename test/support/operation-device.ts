// A device of the CPU library whose operations are called one by one with arrays: kernel tests put numbers in and
// get numbers back, without a model.

import { Batch, type BatchLimits, type BatchSequence } from "../../sidecar/model/batch.ts";
import {
  type Device,
  type DeviceAddress,
  type DeviceConfig,
  DTYPE_BYTES,
  type HostAddress,
  hostView,
  type Isa,
  NativeError,
  NO_ADDRESS,
  Status,
  type WeightHandle,
} from "../../sidecar/native.ts";
import { cpuLibrary } from "./cpu-library.ts";
import type { SeededRandom } from "./seeded-random.ts";

export type FloatDtype = "f32" | "f16" | "bf16";

const WAIT_US = 60_000_000;
const DEFAULTS: DeviceConfig = {
  layers: 1,
  hiddenSize: 32,
  heads: 1,
  kvHeads: 1,
  headDim: 16,
  rotaryDim: 0,
  vocabSize: 64,
  blockTokens: 8,
  maxPositions: 256,
  maxRows: 64,
  maxSequences: 8,
  computeDtype: "f32",
  kvDtype: "f32",
  attentionScale: 1,
  threadCount: 2,
  isa: "best",
  gpuIndex: 0,
};

/** Instruction sets that this processor has. */
export const ISAS: readonly Isa[] = (["avx512", "avx2", "portable"] as const).filter((isa) => {
  try {
    cpuLibrary.openDevice({ ...DEFAULTS, isa }).close();
    return true;
  } catch (error) {
    if (error instanceof NativeError && error.status === Status.unsupported) return false;
    throw error;
  }
});

/** `values` as the dtype stores them, each rounded to nearest even. */
export function rounded(values: Float32Array, dtype: FloatDtype): Float32Array {
  if (dtype === "f32") return values;
  const bits = bitsOf(values, dtype);
  return dtype === "f16"
    ? Float32Array.from(new Float16Array(bits.buffer))
    : Float32Array.from(bits, (half) => new Float32Array(Uint32Array.of(half << 16).buffer)[0]!);
}

/** 16-bit patterns of `values`. */
function bitsOf(values: Float32Array, dtype: "f16" | "bf16"): Uint16Array {
  if (dtype === "f16") return new Uint16Array(Float16Array.from(values).buffer);
  const words = new Uint32Array(values.buffer, values.byteOffset, values.length);
  return Uint16Array.from(words, (word, i) =>
    Number.isNaN(values[i]) ? 0x7fc0 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16,
  );
}

export function bytesOf(values: Float32Array, dtype: FloatDtype): Uint8Array {
  const array = dtype === "f32" ? values : bitsOf(values, dtype);
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

export function floatsOf(bytes: ArrayBuffer, dtype: FloatDtype): Float32Array {
  if (dtype === "f32") return new Float32Array(bytes);
  if (dtype === "f16") return Float32Array.from(new Float16Array(bytes));
  return Float32Array.from(new Uint16Array(bytes), (half) => {
    return new Float32Array(Uint32Array.of(half << 16).buffer)[0]!;
  });
}

export function normals(random: SeededRandom, length: number): Float32Array {
  return Float32Array.from({ length }, () => random.normal());
}

export class OperationDevice {
  readonly device: Device;

  constructor(config: Partial<DeviceConfig> = {}) {
    this.device = cpuLibrary.openDevice({ ...DEFAULTS, ...config });
  }

  place(values: Float32Array): DeviceAddress {
    const address = this.device.alloc(values.byteLength);
    this.device.copyIn(address, values);
    return address;
  }

  /** Device memory full of NaN, so that what an operation leaves unwritten shows. */
  poisoned(length: number): DeviceAddress {
    return this.place(new Float32Array(length).fill(NaN));
  }

  weight(rows: number, cols: number, dtype: FloatDtype, values: Float32Array): WeightHandle {
    const weight = this.device.createWeight(rows, cols, dtype);
    const source = bytesOf(values, dtype);
    this.device.uploadWeight({ weight, rowBegin: 0, rowCount: rows, source, sourceDtype: dtype });
    return weight;
  }

  /** Waits for the compute stream. */
  read(address: DeviceAddress, length: number): Float32Array {
    const buffer = this.device.allocHost(length * DTYPE_BYTES.f32);
    this.device.copyOut(buffer.address, address, length * DTYPE_BYTES.f32);
    this.finish();
    const values = new Float32Array(buffer.bytes.slice(0, length * DTYPE_BYTES.f32));
    this.device.freeHost(buffer.address);
    return values;
  }

  finish(): void {
    const event = this.device.createEvent();
    this.device.record("compute", event, true);
    while (!this.device.isDone(event)) this.device.wait(WAIT_US);
  }

  /** Begins a step of these sequences; the batch holds what is sampled. */
  begin(sequences: readonly BatchSequence[], limits: Partial<BatchLimits> = {}): Batch {
    const { maxRows, maxSequences, maxPositions, blockTokens } = this.device.config;
    const maxBlocksPerSequence = Math.ceil(maxPositions / blockTokens) + 1;
    const batch = new Batch(this.device, { maxRows, maxSequences, maxBlocksPerSequence, maxBiases: 16, ...limits });
    for (const sequence of sequences) batch.add(sequence);
    batch.seal();
    this.device.beginStep(batch.stepAddress, batch.stepBytes);
    return batch;
  }

  [Symbol.dispose](): void {
    this.device.close();
  }
}

/** Rows [position, position + rowCount) of a sequence, without logits. */
export function rowsOf(
  slot: number,
  position: number,
  rowCount: number,
  blockTable: ArrayLike<number>,
): BatchSequence {
  return {
    slot, position, rowCount, blockTable, logits: "none", sampling: null, promptLength: 0, rngPosition: 0,
  };
}

/** KV of one layer, by block: [K|V][kv head][token][head_dim], through the host tier. */
export class KvAccess {
  readonly #slots: HostAddress;
  readonly #slotBytes: number;

  constructor(
    readonly device: Device,
    readonly blockCount: number,
  ) {
    device.createKv(blockCount);
    this.#slots = device.openHostArena(null, blockCount).slotsAddress;
    this.#slotBytes = device.blockBytes().slotBytes;
  }

  /** values: (2, kvHeads, blockTokens, headDim), stored as the device's KV dtype. */
  write(layer: number, block: number, values: Float32Array): void {
    const bytes = bytesOf(values, this.device.config.kvDtype as FloatDtype);
    new Uint8Array(this.#view(layer, block)).set(bytes);
    this.#move("load", layer, block);
  }

  read(layer: number, block: number): Float32Array {
    this.#move("save", layer, block);
    return floatsOf(this.#view(layer, block).slice(0), this.device.config.kvDtype as FloatDtype);
  }

  #view(layer: number, block: number): ArrayBuffer {
    const layerBytes = this.device.blockBytes().blockBytes / this.device.config.layers;
    return hostView((this.#slots + block * this.#slotBytes + layer * layerBytes) as HostAddress, layerBytes);
  }

  #move(direction: "load" | "save", layer: number, block: number): void {
    const event = this.device.createEvent();
    const blocks = Int32Array.of(block);
    if (direction === "load") this.device.loadLayer(layer, blocks, blocks, event);
    else this.device.saveLayer(layer, blocks, blocks, event);
    while (!this.device.isDone(event)) this.device.wait(WAIT_US);
  }
}

export { NO_ADDRESS };
