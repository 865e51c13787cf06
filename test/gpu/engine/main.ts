// How fast the engine is on a device, for models of real shape and made-up weights, each number beside its floor.
// usage: bun test/gpu/engine/main.ts LIBRARY --shapes 8b,13b,8b:fp8 [--parts decode,prefill,load,turn,saving,
//        conversations] [--batches 1,16,64] [--copy-tbs 4.3] [--host-gbs 55.5] [--tflops 780]
//        [--trace sidecar/simulate/traces/sharegpt.tsv.gz] [--json FILE]

import { writeFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { freeMemoryBytes } from "../../../sidecar/engine/tier-size.ts";
import { loadModel, type Model } from "../../../sidecar/model/model.ts";
import { readTrace, type Session } from "../../../sidecar/simulate/trace.ts";
import type { BenchEngineOptions } from "./bench-engine.ts";
import { productRates } from "./product-rate.ts";
import { RawSteps } from "./raw-steps.ts";
import { modelDirectory } from "./shapes.ts";
import { conversations, measureTurns, type Place, savingMs } from "./turns.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    shapes: { type: "string", default: "tiny" },
    parts: { type: "string", default: "decode,prefill,load,turn,saving,conversations" },
    batches: { type: "string", default: "1,16,48,64" },
    "copy-tbs": { type: "string", default: "4.3" },
    "host-gbs": { type: "string", default: "55.5" },
    tflops: { type: "string", default: "780" },
    "max-rows": { type: "string", default: "2048" },
    trace: { type: "string" },
    json: { type: "string" },
  },
});
const libraryPath = positionals[0];
if (libraryPath === undefined) throw new Error("which library? see the head of this file");
const COPY_BYTES_PER_MS = Number(values["copy-tbs"]) * 1e9;
const HOST_BYTES_PER_MS = Number(values["host-gbs"]) * 1e6;
/** Of a large bf16 product; FP8 doubles it on paper. */
const FLOPS_PER_MS = Number(values.tflops) * 1e9;
const MAX_ROWS = Number(values["max-rows"]);
const MAX_SEQUENCES = 64;
const BLOCK_TOKENS = 64;
const ANSWER_TOKENS_MAX = 64;
const HISTORY: Readonly<Record<string, readonly number[]>> = {
  "1b": [2048], "8b": [8192], "13b": [2048], "32b": [2048, 8192], tiny: [1024],
};

interface Row {
  readonly shape: string;
  readonly what: string;
  readonly measured: number;
  readonly unit: string;
  /** The best that the machine allows, same unit; null: there is no such bound. */
  readonly floor: number | null;
}

const rows: Row[] = [];

function note(shape: string, what: string, measured: number, unit: string, floor: number | null): void {
  rows.push({ shape, what, measured, unit, floor });
  const bound = floor === null ? "" : `  floor ${floor.toFixed(2)}  x ${(measured / floor).toFixed(2)}`;
  console.log(`${shape.padEnd(8)} ${what.padEnd(48)} ${measured.toFixed(2).padStart(9)} ${unit}${bound}`);
}

/** Of a shape such as 8b or 8b:fp8. */
function sizeOf(shape: string): string {
  return shape.split(":")[0]!;
}

function isFp8(shape: string): boolean {
  return shape.endsWith(":fp8");
}

/** Of all layers' matrices. */
function layerWeights({ config }: Model): number {
  const { hiddenSize, intermediateSize, layers, heads, kvHeads, headDim } = config;
  const attention = hiddenSize * (heads + 2 * kvHeads) * headDim + heads * headDim * hiddenSize;
  return layers * (attention + 3 * hiddenSize * intermediateSize);
}

/** Bytes of all matrices that a decode step reads. */
function weightBytes(shape: string, model: Model): number {
  const { vocabSize, hiddenSize } = model.config;
  return (isFp8(shape) ? 1 : 2) * layerWeights(model) + 2 * vocabSize * hiddenSize;
}

/** Products of the layers and causal attention of a prompt. */
function prefillFloorMs(shape: string, model: Model, rows: number): number {
  const { layers, heads, headDim } = model.config;
  const products = (2 * rows * layerWeights(model)) / (isFp8(shape) ? 2 : 1);
  const attention = 2 * rows * rows * heads * headDim * layers;
  return (products + attention) / FLOPS_PER_MS;
}

function kvBytesPerToken({ config }: Model): number {
  return 2 * 2 * config.layers * config.kvHeads * config.headDim;
}

function benchDecode(shape: string, model: Model, raw: RawSteps): void {
  const context = shape === "tiny" ? 256 : 2048;
  const perStep = (count: number) =>
    (weightBytes(shape, model) + count * context * kvBytesPerToken(model)) / COPY_BYTES_PER_MS;
  for (const count of values.batches.split(",").map(Number)) {
    if ((count === 48) !== (sizeOf(shape) === "13b") && count >= 48) continue;
    try {
      const { stepMs, deviceMs } = raw.decodeMs(count, context, 40);
      note(shape, `decode, batch ${count}, ${context} of context`, stepMs, "ms", perStep(count));
      note(shape, "  its kernels alone, over and over", deviceMs, "ms", perStep(count));
    } catch (error) {
      console.log(`${shape} decode, batch ${count}: ${(error as Error).message}`);
    }
  }
}

function benchTurns(shape: string, model: Model, options: BenchEngineOptions, raw: RawSteps): void {
  const places: readonly Place[] = ["recompute", "gpu", "host", "host, no pre-loading", "host, load or compute"];
  for (const history of HISTORY[sizeOf(shape)]!) {
    const loadMs = (history * kvBytesPerToken(model)) / HOST_BYTES_PER_MS;
    const computeMs = raw.prefillMs(history, 128, 6, false);
    note(shape, `128 new tokens behind ${history} on the gpu`, computeMs, "ms", null);
    for (const place of places) {
      const floor = place === "host" ? Math.max(loadMs, computeMs) : null;
      const { ms, loadBytesPerMs, stepMs } = measureTurns(model, options, { history, fresh: 128, place, repeats: 5 });
      note(shape, `a turn, ${history} + 128 new: ${place}`, ms, "ms", floor);
      if (!place.startsWith("host") || loadBytesPerMs === null || stepMs === null) continue;
      const expected = `${(loadBytesPerMs / 1e6).toFixed(1)} GB/s, a step of 128 in ${stepMs.toFixed(1)} ms`;
      console.log(`${shape.padEnd(8)}   expected there: loads at ${expected}`);
    }
  }
}

function benchConversations(shape: string, model: Model, options: BenchEngineOptions, trace: string): void {
  const sessions = pickSessions(readTrace(trace), 64);
  const workingSet = sessions.reduce((sum, turns) => sum + blocksOf(turns), 0);
  const all = Math.min(options.gpuBlocks, workingSet + 2 * MAX_SEQUENCES);
  const tenth = Math.max(Math.ceil(workingSet / 10), Math.ceil((model.maxModelLen + 1) / BLOCK_TOKENS) + 2);
  const cases = [
    // What happens once (shapes timed when they are met, code compiled) shows here, and not in the next one.
    ["all KV fits the gpu, the first time", all, true],
    ["all KV fits the gpu", all, true],
    ["a tenth of it fits the gpu", tenth, true],
    ["a tenth fits, cache off", tenth, false],
    ["all fits, cache off", all, false],
  ] as const;
  for (const [name, gpuBlocks, isCached] of cases) {
    const result = conversations(model, { ...options, gpuBlocks }, sessions, isCached);
    const { tokensPerS, ttftP50Ms, ttftP99Ms, cachedShare } = result;
    note(shape, `conversations, ${name}`, tokensPerS, "tokens/s", null);
    note(shape, `  TTFT p50 (${(cachedShare * 100).toFixed(1)} % of prompt tokens cached)`, ttftP50Ms, "ms", null);
    note(shape, "  TTFT p99", ttftP99Ms, "ms", null);
  }
}

/** The first sessions with enough turns, cut to eight and to 64 tokens an answer, short enough for the context. */
function pickSessions(all: readonly Session[], count: number): Session[] {
  const isShort = (turns: Session) => blocksOf(turns) * BLOCK_TOKENS < 7000;
  return all
    .filter((turns) => turns.length >= 8)
    .map((turns) => turns.slice(0, 8).map(withShortAnswer))
    .filter(isShort)
    .slice(0, count);
}

function withShortAnswer(turn: Session[number]): Session[number] {
  return { ...turn, outputTokens: Math.min(turn.outputTokens, ANSWER_TOKENS_MAX) };
}

function blocksOf(turns: Session): number {
  const tokens = turns.reduce((sum, { newTokens, outputTokens }) => sum + newTokens + outputTokens, 0);
  return Math.ceil(tokens / BLOCK_TOKENS);
}

async function bench(shape: string, parts: ReadonlySet<string>): Promise<void> {
  const beginMs = performance.now();
  const model = await loadModel({
    libraryPath: libraryPath!,
    directory: modelDirectory(sizeOf(shape)),
    randomWeights: true,
    maxModelLen: 9216,
    maxRows: MAX_ROWS,
    maxSequences: MAX_SEQUENCES,
    blockTokens: BLOCK_TOKENS,
    kvDtype: "bf16",
    computeDtype: "bf16",
    quantization: isFp8(shape) ? "fp8" : "none",
    threads: 0,
    gpuIndex: 0,
    onProgress: (message) => console.log(message),
  });
  const { device } = model;
  const { blockBytes, slotBytes } = device.blockBytes();
  const { freeBytes } = device.memoryInfo();
  const isGpu = device.info()["backend"] === "cuda";
  const gpuBlocks = Math.min(6000, Math.floor((freeBytes * (isGpu ? 0.9 : 0.2)) / blockBytes));
  device.createKv(gpuBlocks);
  console.log(`${shape}: ${JSON.stringify(device.info())}, ${gpuBlocks} KV blocks of ${blockBytes} bytes`);
  const hostBytes = Math.min(freeMemoryBytes() * 0.6, 6000 * slotBytes);
  const options = {
    libraryPath: libraryPath!,
    gpuBlocks,
    hostBytes,
    maxBatchTokens: MAX_ROWS,
    maxSequences: MAX_SEQUENCES,
  };
  const raw = new RawSteps(model, gpuBlocks, MAX_ROWS, MAX_SEQUENCES);
  note(shape, "loaded", performance.now() - beginMs, "ms", null);
  if (isGpu) note(shape, "warmed up", raw.warmUpMs(), "ms", null);
  if (parts.has("prefill")) {
    const tokens = Math.min(2048, MAX_ROWS);
    const floor = prefillFloorMs(shape, model, tokens);
    note(shape, `prefill of ${tokens}, alone`, raw.prefillMs(0, tokens, 12, true), "ms", floor);
    note(shape, `prefill of ${tokens}, one behind the other`, raw.prefillMs(0, tokens, 12, false), "ms", floor);
    note(shape, "  its kernels alone, over and over", raw.repeatedMs(12), "ms", floor);
  }
  if (parts.has("decode")) benchDecode(shape, model, raw);
  if (parts.has("load")) {
    const lengths = shape === "tiny" ? [1024] : [2048, 8192];
    device.openHostArena(null, lengths.at(-1)! / BLOCK_TOKENS);
    for (const tokens of lengths) {
      const floor = (tokens * kvBytesPerToken(model)) / HOST_BYTES_PER_MS;
      note(shape, `layer-wise load of ${tokens} tokens`, raw.loadMs(tokens, 12), "ms", floor);
    }
    device.closeHostArena(true);
  }
  if (parts.has("turn")) benchTurns(shape, model, options, raw);
  if (parts.has("saving")) {
    const { on, off } = savingMs(model, options, { prompt: shape === "tiny" ? 1024 : 8192, answer: 64, repeats: 3 });
    note(shape, "8K prompt and 64 tokens, saving on", on, "ms", off);
  }
  if (parts.has("conversations") && values.trace !== undefined) benchConversations(shape, model, options, values.trace);
  device.close();
}

const parts = new Set(values.parts.split(","));
if (parts.has("prefill") && libraryPath.includes("cuda")) {
  const { burst, sustained } = productRates(libraryPath);
  note("card", "product of 8192 x 8192 x 8192, a few", burst, "TFLOP/s", null);
  note("card", "the same for seconds: its power is the limit", sustained, "TFLOP/s", null);
}
for (const shape of values.shapes.split(",")) await bench(shape, parts);
if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(rows, null, 1)}\n`);
process.exit(0);
