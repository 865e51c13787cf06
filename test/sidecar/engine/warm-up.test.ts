// The steps that a GPU runs before the first request: which sizes they have, here on the CPU.

import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { ModelRunner } from "../../../sidecar/engine/model-runner.ts";
import { warmUp, warmUpRows } from "../../../sidecar/engine/warm-up.ts";
import { Batch } from "../../../sidecar/model/batch.ts";
import { loadModel, type Model } from "../../../sidecar/model/model.ts";
import { cpuLibraryPath } from "../../support/cpu-library.ts";

const LLAMA = join(import.meta.dir, "../../golden/models/llama3-gqa");

/** Notes the shape of each step that it runs. */
class NotingRunner extends ModelRunner {
  readonly steps: { rows: number; sequences: number; logits: number }[] = [];

  override run(batch: Batch): void {
    this.steps.push({ rows: batch.rowCount, sequences: batch.sequenceCount, logits: batch.logitCount });
    super.run(batch, null);
  }
}

async function withRunner(
  sizes: { maxRows: number; maxSequences: number; maxModelLen: number; blockCount: number },
  use: (runner: NotingRunner, model: Model) => void,
): Promise<void> {
  const { maxRows, maxSequences, maxModelLen, blockCount } = sizes;
  const model = await loadModel({
    libraryPath: cpuLibraryPath, directory: LLAMA, randomWeights: false, maxModelLen, maxRows, maxSequences,
    blockTokens: 8, kvDtype: "auto", computeDtype: "auto", quantization: "none", threads: 1, gpuIndex: 0,
    onProgress: () => {},
  });
  model.device.createKv(blockCount);
  const limits = { maxRows, maxSequences, maxBlocksPerSequence: Math.ceil((maxModelLen + 1) / 8), maxBiases: 1 };
  use(new NotingRunner(model, [new Batch(model.device, limits)]), model);
  model.device.close();
}

describe("warming up", () => {
  test("meets every number of rows up to 8, then four between powers of two", () => {
    expect(warmUpRows(32)).toEqual([2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]);
    expect(warmUpRows(30)).toEqual([2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 30]);
    expect(warmUpRows(5)).toEqual([2, 3, 4, 5]);
    expect(warmUpRows(1)).toEqual([1]);
  });

  test("leaves no size of the CUDA library's rounding unmet", () => {
    // As library-matmul.cpp rounds rows: to an eighth of the power of two above.
    const rounded = (rows: number): number => {
      let step = 1;
      while (rows > 8 * step) step *= 2;
      return Math.ceil(rows / step) * step;
    };
    const met = new Set(warmUpRows(2048).map(rounded));
    for (let rows = 2; rows <= 2048; rows++) expect(met.has(rounded(rows))).toBe(true);
  });

  test("runs prompts with many logits, and a decode step of each size", async () => {
    await withRunner({ maxRows: 32, maxSequences: 12, maxModelLen: 64, blockCount: 64 }, (runner) => {
      warmUp(runner, 64);
      expect(runner.steps.slice(0, 3)).toEqual([
        { rows: 2, sequences: 1, logits: 1 }, { rows: 3, sequences: 2, logits: 2 },
        { rows: 4, sequences: 3, logits: 3 },
      ]);
      const decodes = runner.steps.filter(({ rows, sequences }) => rows === sequences);
      expect(decodes.map(({ rows }) => rows)).toEqual([1, 2, 4, 8, 12]);
      expect(runner.steps).toContainEqual({ rows: 32, sequences: 12, logits: 12 });
    });
  });

  test("leaves decode steps of more than 256 rows until they come", async () => {
    await withRunner({ maxRows: 300, maxSequences: 300, maxModelLen: 16, blockCount: 300 }, (runner) => {
      warmUp(runner, 300);
      const decodes = runner.steps.filter(({ rows, sequences }) => rows === sequences);
      expect(decodes.at(-1)!.rows).toBe(256);
      expect(runner.steps.some(({ rows }) => rows === 300)).toBe(true);
    });
  });

  test("keeps to short contexts and few blocks", async () => {
    await withRunner({ maxRows: 64, maxSequences: 1, maxModelLen: 16, blockCount: 3 }, (runner) => {
      warmUp(runner, 3);
      expect(Math.max(...runner.steps.map(({ rows }) => rows))).toBe(15);
    });
  });
});
