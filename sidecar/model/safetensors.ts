// Reads safetensors files, one or sharded: 8 bytes of header length, a JSON header, then the tensors' bytes.
// The header is checked against the file before anything is believed; bytes are read where they are wanted,
// never a whole file at once. Format: https://huggingface.co/docs/safetensors.

import { closeSync, existsSync, fstatSync, openSync, readSync } from "node:fs";
import { join } from "node:path";
import { readJsonObject, parseJsonObject } from "./json-fields.ts";
import { ModelError } from "./model-error.ts";
import type { FileRange } from "./read-ahead.ts";

export type TensorDtype = "F32" | "F16" | "BF16" | "I32" | "I64";

const DTYPE_BYTES: Readonly<Record<TensorDtype, number>> = { F32: 4, F16: 2, BF16: 2, I32: 4, I64: 8 };
/** As in the reference implementation. */
const HEADER_BYTES_MAX = 100_000_000;

export interface TensorInfo {
  readonly name: string;
  /** As the header names it; only TensorDtypes can be read. */
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Half-open range of the file. */
  readonly beginByte: number;
  readonly endByte: number;
}

/** One open file. */
export class SafetensorsFile {
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly #descriptor: number;

  /** Throws ModelError when the file is missing, cut short, or its header does not hold together. */
  constructor(readonly path: string) {
    try {
      this.#descriptor = openSync(path, "r");
    } catch (error) {
      throw new ModelError(path, "", `cannot be read (${(error as NodeJS.ErrnoException).code})`);
    }
    try {
      this.tensors = readHeader(path, this.#descriptor);
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /** Fills `into` with the tensor's bytes from `offsetBytes` on. Throws ModelError when the file ends
   * before. */
  read(tensor: TensorInfo, offsetBytes: number, into: Uint8Array): void {
    readExactly(this.path, this.#descriptor, into, tensor.beginByte + offsetBytes, tensor.name);
  }

  /** Bytes [begin, end) of the tensor, as the system knows them. */
  range(tensor: TensorInfo, begin: number, end: number): FileRange {
    return { descriptor: this.#descriptor, beginByte: tensor.beginByte + begin, endByte: tensor.beginByte + end };
  }

  close(): void {
    closeSync(this.#descriptor);
  }
}

/** All tensors of a model directory: model.safetensors, or the shards that model.safetensors.index.json
 * lists. */
export class Checkpoint {
  readonly #files: readonly SafetensorsFile[];
  readonly #tensors = new Map<string, { file: SafetensorsFile; info: TensorInfo }>();
  /** The file to name when a tensor is missing. */
  readonly listing: string;

  /** Throws ModelError. */
  constructor(directory: string) {
    const { listing, paths, fileOf } = findFiles(directory);
    this.listing = listing;
    this.#files = openAll(paths);
    for (const file of this.#files) {
      for (const info of file.tensors.values()) {
        const wantedFile = fileOf?.get(info.name);
        if (wantedFile !== undefined && wantedFile !== file.path) continue;
        this.#tensors.set(info.name, { file, info });
      }
    }
    for (const [name, path] of fileOf ?? []) {
      if (this.#tensors.has(name)) continue;
      this.close();
      throw new ModelError(path, name, `is missing, though ${listing} says it is here`);
    }
  }

  get names(): Iterable<string> {
    return this.#tensors.keys();
  }

  has(name: string): boolean {
    return this.#tensors.has(name);
  }

  /** The tensor and its file. Throws ModelError when it is missing. */
  get(name: string): { file: SafetensorsFile; info: TensorInfo } {
    const found = this.#tensors.get(name);
    if (found === undefined) throw new ModelError(this.listing, name, "this tensor is missing");
    return found;
  }

  close(): void {
    for (const file of this.#files) file.close();
  }
}

/** A whole tensor, converted to numbers: for small ones, such as norms and test data. Throws ModelError. */
export function readTensor(file: SafetensorsFile, info: TensorInfo): Float32Array | Int32Array {
  const bytes = new Uint8Array(info.endByte - info.beginByte);
  file.read(info, 0, bytes);
  switch (info.dtype) {
    case "F32":
      return new Float32Array(bytes.buffer);
    case "BF16": {
      const bits = new Uint16Array(bytes.buffer);
      return new Float32Array(Uint32Array.from(bits, (half) => half << 16).buffer);
    }
    case "F16":
      return Float32Array.from(new Float16Array(bytes.buffer));
    case "I32":
      return new Int32Array(bytes.buffer);
    case "I64":
      return Int32Array.from(new BigInt64Array(bytes.buffer), Number);
    default:
      throw new ModelError(file.path, info.name, `dtype ${info.dtype} cannot be read`);
  }
}

interface CheckpointFiles {
  readonly listing: string;
  readonly paths: readonly string[];
  /** Tensor name -> path, for sharded models. */
  readonly fileOf: ReadonlyMap<string, string> | null;
}

function findFiles(directory: string): CheckpointFiles {
  const single = join(directory, "model.safetensors");
  const index = join(directory, "model.safetensors.index.json");
  if (existsSync(single)) return { listing: single, paths: [single], fileOf: null };
  if (!existsSync(index)) {
    const reason = "is missing, and so is model.safetensors.index.json: there are no weights";
    throw new ModelError(single, "", reason);
  }
  const map = readJsonObject(index)["weight_map"];
  if (typeof map !== "object" || map === null) {
    throw new ModelError(index, "weight_map", "must be an object of tensor names and files");
  }
  const fileOf = new Map<string, string>();
  for (const [name, file] of Object.entries(map)) {
    if (typeof file !== "string" || file.includes("/") || file.includes("\\")) {
      const reason = `must be a file beside it, not ${JSON.stringify(file)}`;
      throw new ModelError(index, `weight_map.${name}`, reason);
    }
    fileOf.set(name, join(directory, file));
  }
  return { listing: index, paths: [...new Set(fileOf.values())].sort(), fileOf };
}

function openAll(paths: readonly string[]): SafetensorsFile[] {
  const files: SafetensorsFile[] = [];
  try {
    for (const path of paths) files.push(new SafetensorsFile(path));
  } catch (error) {
    for (const file of files) file.close();
    throw error;
  }
  return files;
}

function readHeader(path: string, descriptor: number): Map<string, TensorInfo> {
  const fileBytes = fstatSync(descriptor).size;
  const lengthBytes = new Uint8Array(8);
  readExactly(path, descriptor, lengthBytes, 0, "header length");
  const headerBytes = Number(new DataView(lengthBytes.buffer).getBigUint64(0, true));
  if (headerBytes > HEADER_BYTES_MAX || 8 + headerBytes > fileBytes) {
    const reason = `header of ${headerBytes} bytes in a file of ${fileBytes}: not safetensors, or cut short`;
    throw new ModelError(path, "", reason);
  }
  const header = new Uint8Array(headerBytes);
  readExactly(path, descriptor, header, 8, "header");
  const entries = parseJsonObject(path, new TextDecoder().decode(header));
  const tensors = Object.entries(entries)
    .filter(([name]) => name !== "__metadata__")
    .map(([name, entry]) => parseEntry(path, name, entry, 8 + headerBytes, fileBytes))
    .sort((a, b) => a.beginByte - b.beginByte || a.endByte - b.endByte);
  for (let i = 1; i < tensors.length; i++) {
    const [before, after] = [tensors[i - 1]!, tensors[i]!];
    if (after.beginByte < before.endByte) {
      throw new ModelError(path, after.name, `its bytes overlap those of ${before.name}`);
    }
  }
  return new Map(tensors.map((tensor) => [tensor.name, tensor]));
}

function parseEntry(
  path: string,
  name: string,
  entry: unknown,
  dataBegin: number,
  fileBytes: number,
): TensorInfo {
  const { dtype, shape, data_offsets: offsets } = (entry ?? {}) as Record<string, unknown>;
  const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;
  if (typeof dtype !== "string" || !Array.isArray(shape) || !shape.every(isCount)) {
    throw new ModelError(path, name, "its header entry lacks dtype or shape");
  }
  const isPair = Array.isArray(offsets) && offsets.length === 2 && offsets.every(isCount);
  if (!isPair || offsets[0]! > offsets[1]!) {
    throw new ModelError(path, name, "its data_offsets are not a range");
  }
  const [begin, end] = offsets as [number, number];
  if (dataBegin + end > fileBytes) {
    const reason = `its bytes end at ${dataBegin + end}, but the file at ${fileBytes}: it is cut short`;
    throw new ModelError(path, name, reason);
  }
  const elementBytes = DTYPE_BYTES[dtype as TensorDtype];
  const wantedBytes = elementBytes === undefined ? null : shape.reduce((a, b) => a * b, elementBytes);
  if (wantedBytes !== null && wantedBytes !== end - begin) {
    const reason = `${dtype} of shape [${shape.join(", ")}] is ${wantedBytes} bytes, not ${end - begin}`;
    throw new ModelError(path, name, reason);
  }
  return { name, dtype, shape, beginByte: dataBegin + begin, endByte: dataBegin + end };
}

function readExactly(
  path: string,
  descriptor: number,
  into: Uint8Array,
  position: number,
  what: string,
): void {
  let done = 0;
  while (done < into.length) {
    const count = readSync(descriptor, into, done, into.length - done, position + done);
    if (count === 0) throw new ModelError(path, what, `the file ends before byte ${position + into.length}`);
    done += count;
  }
}
