// Makes model directories for tests: JSON files, and safetensors files from plain numbers.

import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

/** A directory that is removed at the end of the `using` block. Objects are written as JSON. */
export class ModelDirectory {
  readonly path = mkdtempSync(join(tmpdir(), "kvasir-model-"));

  constructor(files: Readonly<Record<string, string | Uint8Array | object>> = {}) {
    for (const [name, content] of Object.entries(files)) this.write(name, content);
  }

  write(name: string, content: string | Uint8Array | object): string {
    const path = this.file(name);
    mkdirSync(dirname(path), { recursive: true });
    const isRaw = typeof content === "string" || content instanceof Uint8Array;
    writeFileSync(path, isRaw ? content : JSON.stringify(content));
    return path;
  }

  file(name: string): string {
    return join(this.path, name);
  }

  [Symbol.dispose](): void {
    rmSync(this.path, { recursive: true });
  }
}

export interface TestTensor {
  readonly shape: readonly number[];
  /** Stored as F32, unless dtype says otherwise. */
  readonly values: ArrayLike<number>;
  readonly dtype?: "F32" | "F16" | "BF16";
}

/** Bytes of a safetensors file. */
export function safetensorsBytes(tensors: Readonly<Record<string, TestTensor>>): Uint8Array {
  const header: Record<string, object> = { __metadata__: { format: "pt" } };
  const bodies: Uint8Array[] = [];
  let at = 0;
  for (const [name, { shape, values, dtype = "F32" }] of Object.entries(tensors)) {
    const body = tensorBytes(values, dtype);
    header[name] = { dtype, shape, data_offsets: [at, at + body.length] };
    bodies.push(body);
    at += body.length;
  }
  return safetensorsFile(header, Buffer.concat(bodies));
}

/** A file with this very header, however wrong. */
export function safetensorsFile(header: object | string, body: Uint8Array): Uint8Array {
  const text = Buffer.from(typeof header === "string" ? header : JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, text, body]);
}

function tensorBytes(values: ArrayLike<number>, dtype: "F32" | "F16" | "BF16"): Uint8Array {
  const floats = Float32Array.from(values);
  switch (dtype) {
    case "F32":
      return new Uint8Array(floats.buffer);
    case "F16":
      return new Uint8Array(Float16Array.from(floats).buffer);
    case "BF16":
      return new Uint8Array(Uint16Array.from(new Uint32Array(floats.buffer), (bits) => bits >>> 16).buffer);
  }
}
