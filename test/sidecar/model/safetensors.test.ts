// Weights files as they are on disk, whole and broken.

import { describe, expect, test } from "bun:test";
import { truncateSync } from "node:fs";
import { ModelError } from "../../../sidecar/model/model-error.ts";
import { Checkpoint, readTensor, SafetensorsFile } from "../../../sidecar/model/safetensors.ts";
import { ModelDirectory, safetensorsBytes, safetensorsFile } from "../../support/model-directory.ts";

const A = { shape: [2, 3], values: [1, 2, 3, 4, 5, 6] };
const B = { shape: [2], values: [-1, 0.5] };

function errorOf(body: () => unknown): ModelError {
  try {
    body();
  } catch (error) {
    expect(error).toBeInstanceOf(ModelError);
    return error as ModelError;
  }
  throw new Error("nothing was thrown");
}

function openBytes(bytes: Uint8Array): ModelError {
  using directory = new ModelDirectory({ "model.safetensors": bytes });
  return errorOf(() => new SafetensorsFile(directory.file("model.safetensors")));
}

describe("a safetensors file", () => {
  for (const dtype of ["F32", "F16", "BF16"] as const) {
    test(`gives back ${dtype} tensors`, () => {
      const bytes = safetensorsBytes({ a: { ...A, dtype }, b: B });
      using directory = new ModelDirectory({ "x.safetensors": bytes });
      const file = new SafetensorsFile(directory.file("x.safetensors"));
      const a = file.tensors.get("a")!;
      expect(a.shape).toEqual([2, 3]);
      expect([...readTensor(file, a)]).toEqual(A.values);
      expect([...readTensor(file, file.tensors.get("b")!)]).toEqual(B.values);
      file.close();
    });
  }

  test("is read from any offset", () => {
    using directory = new ModelDirectory({ "x.safetensors": safetensorsBytes({ b: B, a: A }) });
    const file = new SafetensorsFile(directory.file("x.safetensors"));
    const row = new Float32Array(3);
    file.read(file.tensors.get("a")!, 12, new Uint8Array(row.buffer));
    file.close();
    expect([...row]).toEqual([4, 5, 6]);
  });

  test("that is missing is named", () => {
    const error = errorOf(() => new SafetensorsFile("nowhere/model.safetensors"));
    expect(error.message).toBe("nowhere/model.safetensors: cannot be read (ENOENT)");
  });

  test("of a few bytes is refused", () => {
    expect(openBytes(Uint8Array.of(1, 2, 3)).message).toContain("header length: the file ends before byte 8");
  });

  test("whose header is longer than the file is refused", () => {
    expect(openBytes(new Uint8Array(16).fill(1)).message).toContain("not safetensors, or cut short");
  });

  test("whose header is no JSON is refused", () => {
    expect(openBytes(safetensorsFile("{nonsense", new Uint8Array(0))).message).toContain("is not JSON");
  });

  test("that is cut short names the tensor that is not all there", () => {
    using directory = new ModelDirectory();
    const bytes = safetensorsBytes({ a: A, b: B });
    const path = directory.write("model.safetensors", bytes);
    truncateSync(path, bytes.length - 1);
    const error = errorOf(() => new SafetensorsFile(path));
    expect(error.field).toBe("b");
    expect(error.message).toContain("it is cut short");
  });

  test("that shrinks while it is open is refused on reading", () => {
    using directory = new ModelDirectory();
    const bytes = safetensorsBytes({ a: A, b: B });
    const path = directory.write("model.safetensors", bytes);
    const file = new SafetensorsFile(path);
    truncateSync(path, bytes.length - 1);
    const error = errorOf(() => readTensor(file, file.tensors.get("b")!));
    file.close();
    expect(error.field).toBe("b");
  });

  const refused: Record<string, [entry: object, reason: string]> = {
    "overlapping tensors": [
      {
        a: { dtype: "F32", shape: [1], data_offsets: [0, 4] },
        b: { dtype: "F32", shape: [1], data_offsets: [2, 6] },
      },
      "b: its bytes overlap those of a",
    ],
    "a shape that does not fit the bytes": [
      { a: { dtype: "F32", shape: [3], data_offsets: [0, 8] } },
      "a: F32 of shape [3] is 12 bytes, not 8",
    ],
    "a negative offset": [{ a: { dtype: "F32", shape: [1], data_offsets: [-4, 0] } }, "not a range"],
    "offsets that run backwards": [{ a: { dtype: "F32", shape: [1], data_offsets: [4, 0] } }, "not a range"],
    "a fractional shape": [{ a: { dtype: "F32", shape: [0.5], data_offsets: [0, 2] } }, "lacks dtype"],
    "an entry that is no object": [{ a: null }, "lacks dtype or shape"],
  };
  for (const [what, [header, reason]] of Object.entries(refused)) {
    test(`with ${what} is refused`, () => {
      expect(openBytes(safetensorsFile(header, new Uint8Array(8))).message).toContain(reason);
    });
  }
});

describe("a checkpoint", () => {
  const index = { weight_map: { a: "model-1.safetensors", b: "model-2.safetensors" } };

  test("joins the shards of its index", () => {
    using directory = new ModelDirectory({
      "model.safetensors.index.json": index,
      "model-1.safetensors": safetensorsBytes({ a: A }),
      "model-2.safetensors": safetensorsBytes({ b: B }),
    });
    const checkpoint = new Checkpoint(directory.path);
    expect([...checkpoint.names].sort()).toEqual(["a", "b"]);
    const { file, info } = checkpoint.get("b");
    expect([...readTensor(file, info)]).toEqual(B.values);
    checkpoint.close();
  });

  test("names the shard that lacks a tensor", () => {
    using directory = new ModelDirectory({
      "model.safetensors.index.json": index,
      "model-1.safetensors": safetensorsBytes({ a: A }),
      "model-2.safetensors": safetensorsBytes({ c: B }),
    });
    const error = errorOf(() => new Checkpoint(directory.path));
    expect(error.file).toBe(directory.file("model-2.safetensors"));
    expect(error.field).toBe("b");
  });

  test("names the shard that is missing", () => {
    using directory = new ModelDirectory({
      "model.safetensors.index.json": index,
      "model-1.safetensors": safetensorsBytes({ a: A }),
    });
    const { message } = errorOf(() => new Checkpoint(directory.path));
    expect(message).toContain("model-2.safetensors: cannot be read");
  });

  test("does not follow an index out of its directory", () => {
    using directory = new ModelDirectory({
      "model.safetensors.index.json": { weight_map: { a: "../a.safetensors" } },
    });
    expect(errorOf(() => new Checkpoint(directory.path)).message).toContain("must be a file beside it");
  });

  test("without weights says which files it looked for", () => {
    using directory = new ModelDirectory();
    expect(errorOf(() => new Checkpoint(directory.path)).message).toContain("model.safetensors.index.json");
  });
});
