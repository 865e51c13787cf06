// How far the GPU's distributions are from a reference: of the bundled model on text it was not trained on, against the
// CPU library in F32; of checkpoints that reference-logits.py wrote, against the reference implementation in fp32, with
// that implementation's own bf16 beside it. The mean divergence is at most 1e-3 nats in F16 and BF16, and of the
// bundled model in FP8 3e-2; of made-up weights, which blow roundings up, it may be fifty times the reference's own
// BF16 in FP8, whose roundings are sixteen times as large. The likeliest token is the reference's at 99 % of all
// positions in F16; in BF16 at 98 %, and no less often than in the reference's own BF16.
// Prompts are fed in large steps and, of the bundled model, in steps of 8 rows, which other products serve.
// usage: bun test/gpu/accuracy-check.ts libkvasir_cuda.so [DIRECTORY ...]

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { loadTokenizer } from "../../sidecar/model/tokenizer.ts";
import { TestModel } from "../support/test-model.ts";

const [libraryPath, ...directories] = process.argv.slice(2);
if (libraryPath === undefined) throw new Error("which library? see the head of this file");
const BUNDLED = join(import.meta.dir, "../../sidecar/models/kvasir-15m-chat");
const DIVERGENCE_MAX = { f16: 1e-3, bf16: 1e-3, fp8: 3e-2 } as const;
const AGREEMENT_MIN = { f16: 0.99, bf16: 0.98, fp8: 0 } as const;
const FP8_TO_BF16_MAX = 50;
const CHUNK = 256;
/** Of the bundled model's text. */
const TEXT_TOKENS = 8192;
const WINDOW = 2048;
/** FP8: weights and activations; the rest is BF16. */
const NUMBERS = ["f16", "bf16", "fp8"] as const;
type Numbers = (typeof NUMBERS)[number];

/** Sums over positions. */
class Comparison {
  #positions = 0;
  #divergence = 0;
  #agreeing = 0;
  /** Of those where the reference's two likeliest are further apart than 0.1 nats. */
  #clear = 0;
  #clearAgreeing = 0;

  add(logits: Float32Array, reference: Float32Array, vocabSize: number): void {
    for (let begin = 0; begin < reference.length; begin += vocabSize) {
      this.#addRow(logits.subarray(begin, begin + vocabSize), reference.subarray(begin, begin + vocabSize));
    }
  }

  #addRow(logits: Float32Array, reference: Float32Array): void {
    const [ours, theirs] = [summary(logits), summary(reference)];
    let divergence = 0;
    for (let i = 0; i < reference.length; i++) {
      const logP = reference[i]! - theirs.logSum;
      divergence += Math.exp(logP) * (logP - (logits[i]! - ours.logSum));
    }
    this.#positions++;
    this.#divergence += divergence;
    const isSame = ours.best === theirs.best;
    if (isSame) this.#agreeing++;
    if (theirs.margin < 0.1) return;
    this.#clear++;
    if (isSame) this.#clearAgreeing++;
  }

  get divergence(): number {
    return this.#divergence / this.#positions;
  }

  get agreement(): number {
    return this.#agreeing / this.#positions;
  }

  describe(): string {
    const percent = (share: number) => `${(share * 100).toFixed(2)} %`;
    return (
      `mean divergence ${this.divergence.toExponential(2)} nats, top-1 ${percent(this.agreement)} ` +
      `of ${this.#positions} (${percent(this.#clearAgreeing / this.#clear)} of the ${this.#clear} with a margin of 0.1)`
    );
  }
}

function summary(logits: Float32Array): { logSum: number; best: number; margin: number } {
  let [best, first, second] = [0, -Infinity, -Infinity];
  for (let i = 0; i < logits.length; i++) {
    const value = logits[i]!;
    if (value > first) [best, first, second] = [i, value, first];
    else if (value > second) second = value;
  }
  let sum = 0;
  for (const value of logits) sum += Math.exp(value - first);
  return { logSum: first + Math.log(sum), best, margin: first - second };
}

function open(directory: string, numbers: Numbers): Promise<TestModel> {
  const dtype = numbers === "f16" ? "f16" : "bf16";
  const quantization = numbers === "fp8" ? "fp8" : "none";
  return TestModel.load(directory, {
    libraryPath, computeDtype: dtype, kvDtype: dtype, blockTokens: 64, maxModelLen: WINDOW, quantization,
  });
}

async function compareBundled(numbers: Numbers, chunk: number): Promise<Comparison> {
  const prose = gunzipSync(readFileSync(join(BUNDLED, "eval/prose.txt.gz"))).toString();
  const tokens = (await loadTokenizer(BUNDLED)).encode(prose).slice(0, TEXT_TOKENS);
  using gpu = await open(BUNDLED, numbers);
  using cpu = await TestModel.load(BUNDLED, { blockTokens: 64, maxModelLen: WINDOW });
  const comparison = new Comparison();
  for (let begin = 0; begin < tokens.length; begin += WINDOW) {
    gpu.reset();
    cpu.reset();
    const [onGpu, onCpu] = [gpu.sequence(), cpu.sequence()];
    for (let at = begin; at < Math.min(begin + WINDOW, tokens.length); at += chunk) {
      const ids = tokens.subarray(at, at + chunk);
      const logits = gpu.step([{ sequence: onGpu, ids }])[0]!;
      comparison.add(logits, cpu.step([{ sequence: onCpu, ids }])[0]!, gpu.model.config.vocabSize);
    }
  }
  return comparison;
}

async function compareCheckpoint(directory: string, numbers: Numbers): Promise<Comparison> {
  const tokens = new Int32Array(new Uint8Array(readFileSync(join(directory, "tokens.i32"))).buffer);
  const reference = Bun.file(join(directory, "logits.f32"));
  const beginMs = performance.now();
  using gpu = await open(directory, numbers);
  const { vocabSize } = gpu.model.config;
  console.log(`${directory} ${numbers}: loaded in ${((performance.now() - beginMs) / 1000).toFixed(1)} s`);
  const comparison = new Comparison();
  const sequence = gpu.sequence();
  for (let at = 0; at < tokens.length; at += CHUNK) {
    const ids = tokens.subarray(at, at + CHUNK);
    const bytes = reference.slice(at * vocabSize * 4, (at + ids.length) * vocabSize * 4);
    comparison.add(gpu.step([{ sequence, ids }])[0]!, new Float32Array(await bytes.arrayBuffer()), vocabSize);
  }
  return comparison;
}

let failed = 0;
let passed = 0;

function note(what: string, numbers: Numbers, comparison: Comparison, most: number, ownAgreement = 0): void {
  const isAgreeing = comparison.agreement >= Math.max(AGREEMENT_MIN[numbers], numbers === "bf16" ? ownAgreement : 0);
  const isRight = isAgreeing && comparison.divergence <= most; // NaN is not
  if (isRight) passed++;
  else failed++;
  console.log(`${isRight ? "ok    " : "FAILED"} ${what}, ${numbers}: ${comparison.describe()}`);
}

for (const numbers of NUMBERS) {
  for (const chunk of [CHUNK, 8]) {
    const what = `bundled model against F32 on the CPU, ${chunk} rows a step`;
    note(what, numbers, await compareBundled(numbers, chunk), DIVERGENCE_MAX[numbers]);
  }
}
for (const directory of directories) {
  const { divergence, agreement, entropy } = JSON.parse(readFileSync(join(directory, "reference.json"), "utf8"));
  const own = `divergence ${divergence.toExponential(2)}, top-1 ${(agreement * 100).toFixed(2)} %`;
  console.log(`${directory}: the reference's own bf16 against its fp32: ${own} (entropy ${entropy.toFixed(2)} nats)`);
  for (const numbers of NUMBERS) {
    const most = numbers === "fp8" ? FP8_TO_BF16_MAX * divergence : DIVERGENCE_MAX[numbers];
    note(directory, numbers, await compareCheckpoint(directory, numbers), most, agreement);
  }
}
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed === 0 ? 0 : 1);
