// Whole models on the GPU: the goldens of every family and of the bundled model in F32 against the reference's
// logits and tokens, in F16 and BF16 within their rounding; greedy text of the bundled model against the CPU's.
// usage: bun test/gpu/model-check.ts libkvasir_cuda.so

import { existsSync } from "node:fs";
import { join } from "node:path";
import { readTensor, SafetensorsFile } from "../../sidecar/model/safetensors.ts";
import type { WeightDtype } from "../../sidecar/model/model-config.ts";
import { TestModel } from "../support/test-model.ts";

const [libraryPath] = process.argv.slice(2);
if (libraryPath === undefined) throw new Error("usage: bun test/gpu/model-check.ts libkvasir_cuda.so");
const MODELS = join(import.meta.dir, "../golden/models");
const BUNDLED = join(import.meta.dir, "../../sidecar/models/kvasir-15m-chat");
const FAMILIES = [
  "llama-mha", "llama3-gqa", "mistral-swa", "qwen2-bias", "qwen3-qknorm", "falcon-7b-mqa", "falcon-40b-gqa",
];
const DTYPES: readonly WeightDtype[] = ["f32", "f16", "bf16"];
/** Largest difference of a row's logits, as a share of its largest logit. */
const TOLERANCE: Readonly<Record<WeightDtype, number>> = { f32: 1e-3, f16: 1e-2, bf16: 5e-2 };

/** Of a step of the test model. */
const ROWS_MAX = 256;

let passed = 0;
let failed = 0;

function note(what: string, isRight: boolean, detail: string): void {
  if (isRight) passed++;
  else failed++;
  console.log(`${isRight ? "ok    " : "FAILED"} ${what}: ${detail}`);
}

function worst(actual: Float32Array, expected: Float32Array, vocabSize: number): number {
  let most = actual.length === expected.length ? 0 : Infinity;
  for (let begin = 0; begin < expected.length; begin += vocabSize) {
    let difference = 0;
    let peak = 0;
    for (let i = begin; i < begin + vocabSize; i++) {
      // Math.max keeps a NaN once it has seen one.
      difference = Math.max(difference, Math.abs(actual[i]! - expected[i]!));
      peak = Math.max(peak, Math.abs(expected[i]!));
    }
    most = Math.max(most, difference / peak);
  }
  return most;
}

function load(directory: string, dtype: WeightDtype, blockTokens: number): Promise<TestModel> {
  return TestModel.load(directory, { libraryPath, computeDtype: dtype, kvDtype: dtype, blockTokens });
}

/** Every position's logits, fed whole and in uneven pieces; greedy tokens (through graphs) in F32. */
async function checkFamily(family: string, dtype: WeightDtype): Promise<void> {
  const directory = join(MODELS, family);
  if (!existsSync(join(directory, "golden.safetensors"))) return note(`${family} ${dtype}`, false, "it is not here");
  const file = new SafetensorsFile(join(directory, "golden.safetensors"));
  const read = (name: string) => readTensor(file, file.tensors.get(name)!);
  const ids = read("input_ids") as Int32Array;
  const logits = read("logits") as Float32Array;
  const greedyIds = [...read("greedy_ids")];
  file.close();
  const vocabSize = logits.length / ids.length;
  for (const pieceLength of [Math.min(ids.length, ROWS_MAX), 7]) {
    using model = await load(directory, dtype, 8);
    const sequence = model.sequence();
    const parts: Float32Array[] = [];
    for (let at = 0; at < ids.length; at += pieceLength) {
      parts.push(model.step([{ sequence, ids: ids.subarray(at, at + pieceLength) }])[0]!);
    }
    const all = new Float32Array(logits.length);
    let at = 0;
    for (const part of parts) {
      all.set(part, at);
      at += part.length;
    }
    const deviation = worst(all, logits, vocabSize);
    const what = `${family} ${dtype}, ${parts.length} steps`;
    note(what, deviation < TOLERANCE[dtype], `worst deviation ${deviation.toExponential(2)}`);
    if (dtype !== "f32") continue;
    const chosen = model.greedy(model.sequence(), ids, greedyIds.length);
    note(`${what}, greedy`, chosen.join() === greedyIds.join(), `${chosen.length} tokens`);
  }
}

async function checkBundled(dtype: WeightDtype): Promise<void> {
  if (!existsSync(join(BUNDLED, "model.safetensors"))) {
    note(`bundled ${dtype}`, false, "its weights are not here");
    return;
  }
  const file = new SafetensorsFile(join(BUNDLED, "eval/golden.safetensors"));
  const read = (name: string) => readTensor(file, file.tensors.get(name)!);
  using gpu = await load(BUNDLED, dtype, 64);
  using cpu = await TestModel.load(BUNDLED, { blockTokens: 64, kvDtype: dtype });
  for (let prompt = 0; file.tensors.has(`${prompt}.input_ids`); prompt++) {
    const ids = read(`${prompt}.input_ids`) as Int32Array;
    const logits = read(`${prompt}.logits`) as Float32Array;
    gpu.reset();
    cpu.reset();
    const sequence = gpu.sequence();
    gpu.prefill(sequence, ids.subarray(0, -1));
    const last = gpu.step([{ sequence, ids: ids.subarray(-1) }])[0]!;
    const deviation = worst(last, logits, logits.length);
    const what = `bundled ${dtype}, prompt of ${ids.length}`;
    note(what, deviation < TOLERANCE[dtype], `deviation ${deviation.toExponential(2)}`);
    const [onGpu, onCpu] = [gpu.greedy(gpu.sequence(), ids, 60), cpu.greedy(cpu.sequence(), ids, 60)];
    const same = onGpu.findIndex((id, i) => id !== onCpu[i]);
    const margin = same === -1 ? "" : marginAt(cpu, ids, onCpu.slice(0, same), dtype);
    const detail = same === -1 ? "60 tokens equal" : `differs at ${same}: ${margin}`;
    note(`${what}, greedy against the CPU library`, same === -1 || margin.endsWith("a near tie"), detail);
  }
  file.close();
}

/** Whether the two likeliest tokens behind `answer` are closer than the dtype's rounding, by the CPU library. */
function marginAt(cpu: TestModel, prompt: Int32Array, answer: readonly number[], dtype: WeightDtype): string {
  cpu.reset();
  const sequence = cpu.sequence();
  const ids = Int32Array.from([...prompt, ...answer]);
  cpu.prefill(sequence, ids.subarray(0, -1));
  const logits = cpu.step([{ sequence, ids: ids.subarray(-1) }])[0]!.toSorted((a, b) => b - a);
  const margin = (logits[0]! - logits[1]!) / Math.abs(logits[0]!);
  return `margin ${margin.toExponential(2)}${margin < TOLERANCE[dtype] / 2 ? ", a near tie" : ""}`;
}

for (const dtype of DTYPES) {
  for (const family of FAMILIES) await checkFamily(family, dtype);
  await checkBundled(dtype);
}
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed === 0 ? 0 : 1);
