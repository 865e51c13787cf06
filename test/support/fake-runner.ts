// A device without a device: KV memory that holds, for each position, a hash of all tokens up to it, and a "model" whose
// next token is a hash over all KV that the block table shows it. A wrong table, a block reused too early, a
// position or a token out of place changes every token that follows, so tests need only compare texts.
//
// Work is queued as on a device's compute stream and happens when the test says so.

import { assert } from "../../sidecar/assert.ts";
import type { StepRunner } from "../../sidecar/engine/engine.ts";
import type { EngineSampling } from "../../sidecar/engine/request.ts";
import type { BlockCopier } from "../../sidecar/kvcache/kv-cache.ts";
import { Batch, type BatchLimits } from "../../sidecar/model/batch.ts";
import type { Device, EventHandle, HostAddress, HostBuffer } from "../../sidecar/native.ts";

export const FAKE_VOCAB = 40;
export const FAKE_EOS = 0;
/** Sampled instead of a token, when the runner is told to fail: the logits were not finite. */
const NOT_FINITE = -1;
const RESULT_INTS = 44;

/** What sampling depends on. */
export type FakeSampling = Pick<EngineSampling, "temperature" | "seed">;

export const GREEDY: EngineSampling = {
  temperature: 0, topK: 0, topP: 1, minP: 0, seed: 7, frequencyPenalty: 0, presencePenalty: 0,
  repetitionPenalty: 1, logitBias: [], logprobs: null, ignoreEos: false,
};

/** KV of position `position` holding `token`, given that of the position before. */
function kvOf(before: number, token: number, position: number): number {
  return mix(mix(before, token + 1), position + 101);
}

export function mix(state: number, value: number): number {
  const mixed = Math.imul(state ^ value, 0x9e3779b1) >>> 0;
  return (mixed ^ (mixed >>> 15)) >>> 0;
}

/** KV of each position of `tokens`, computed afresh. */
export function kvValues(tokens: ArrayLike<number>): number[] {
  const values: number[] = [];
  for (let i = 0; i < tokens.length; i++) values.push(kvOf(values.at(-1) ?? 0, tokens[i]!, i));
  return values;
}

function nextToken(kv: readonly number[], sampling: FakeSampling, rngPosition: number): number {
  let logits = 17;
  for (const value of kv) logits = mix(logits, value);
  if (sampling.temperature > 0) logits = mix(mix(logits, sampling.seed % 2 ** 31), rngPosition);
  return logits % FAKE_VOCAB;
}

/** What the model answers when nothing is cached, batched, cut or preempted. */
export function referenceAnswer(
  prompt: ArrayLike<number>,
  { maxTokens, sampling }: { maxTokens: number; sampling: FakeSampling & { ignoreEos: boolean } },
): { tokens: number[]; reason: "stop" | "length" } {
  const tokens = Array.from(prompt);
  const answer: number[] = [];
  while (answer.length < maxTokens) {
    const token = nextToken(kvValues(tokens), sampling, tokens.length);
    if (token === FAKE_EOS && !sampling.ignoreEos) return { tokens: answer, reason: "stop" };
    tokens.push(token);
    answer.push(token);
  }
  return { tokens: answer, reason: "length" };
}

/** The KV memory of `blockCount` blocks. */
export class SimulatedKv implements BlockCopier {
  readonly values: Uint32Array;

  constructor(
    readonly blockCount: number,
    readonly blockTokens: number,
  ) {
    this.values = new Uint32Array(blockCount * blockTokens);
  }

  read(blocks: ArrayLike<number>, position: number): number {
    return this.values[this.#at(blocks, position)]!;
  }

  /** Computes position `position` from the memory itself, as a model does. */
  compute(blocks: ArrayLike<number>, position: number, token: number): void {
    const before = position === 0 ? 0 : this.read(blocks, position - 1);
    this.values[this.#at(blocks, position)] = kvOf(before, token, position);
  }

  copyBlocks(sources: Int32Array, destinations: Int32Array): void {
    sources.forEach((source, i) => {
      const begin = source * this.blockTokens;
      this.values.copyWithin(destinations[i]! * this.blockTokens, begin, begin + this.blockTokens);
    });
  }

  #at(blocks: ArrayLike<number>, position: number): number {
    const block = blocks[Math.floor(position / this.blockTokens)];
    assert(block !== undefined && block >= 0 && block < this.blockCount, `no block at position ${position}`);
    return block * this.blockTokens + (position % this.blockTokens);
  }
}

/** As much of a Device as Batch wants. */
class HostMemory {
  readonly buffers = new Map<number, ArrayBuffer>();
  readonly config: { blockTokens: number };
  #nextEvent = 1;

  constructor(blockTokens: number) {
    this.config = { blockTokens };
  }

  allocHost(byteCount: number): HostBuffer {
    const address = ((this.buffers.size + 1) * 2 ** 32) as HostAddress;
    const bytes = new ArrayBuffer(byteCount);
    this.buffers.set(address, bytes);
    return { address, bytes };
  }

  createEvent(): EventHandle {
    return this.#nextEvent++ as EventHandle;
  }

  ints(address: HostAddress): Int32Array {
    return new Int32Array(this.buffers.get(address)!);
  }
}

type Work =
  | { readonly kind: "tokens"; readonly slot: number; readonly tokens: Int32Array }
  | { readonly kind: "copy"; readonly sources: Int32Array; readonly destinations: Int32Array }
  | { readonly kind: "step"; readonly batch: Batch; readonly input: Int32Array };

export class FakeRunner implements StepRunner, BlockCopier {
  readonly batches: readonly Batch[];
  readonly kv: SimulatedKv;
  /** Rows of each step that ran. */
  readonly stepRows: number[] = [];
  /** The next sample is -1: the logits were not finite. */
  failsNextSample = false;
  readonly #memory: HostMemory;
  readonly #queue: Work[] = [];
  readonly #tokens: Int32Array[];

  constructor({ blockCount, blockTokens, batchCount = 2, limits }: {
    blockCount: number;
    blockTokens: number;
    batchCount?: number;
    limits: BatchLimits;
  }) {
    this.kv = new SimulatedKv(blockCount, blockTokens);
    this.#memory = new HostMemory(blockTokens);
    const device = this.#memory as unknown as Device;
    this.batches = Array.from({ length: batchCount }, () => new Batch(device, limits));
    const longest = limits.maxBlocksPerSequence * blockTokens + 1;
    this.#tokens = Array.from({ length: limits.maxSequences }, () => new Int32Array(longest).fill(-1));
  }

  writeTokens(slot: number, tokens: Int32Array): void {
    this.#queue.push({ kind: "tokens", slot, tokens: tokens.slice() });
  }

  copyBlocks(sources: Int32Array, destinations: Int32Array): void {
    this.#queue.push({ kind: "copy", sources: sources.slice(), destinations: destinations.slice() });
  }

  run(batch: Batch): void {
    assert(this.isFinished(batch), "a batch is used again while the device still works on it");
    batch.seal();
    this.#queue.push({ kind: "step", batch, input: this.#memory.ints(batch.stepAddress).slice() });
  }

  isFinished(batch: Batch): boolean {
    return !this.#queue.some((work) => work.kind === "step" && work.batch === batch);
  }

  get stepsInFlight(): number {
    return this.#queue.filter(({ kind }) => kind === "step").length;
  }

  /** Does what is queued up to the end of the oldest step; false when there was none. */
  finishStep(): boolean {
    for (;;) {
      const work = this.#queue.shift();
      if (work === undefined) return false;
      if (work.kind === "tokens") this.#tokens[work.slot]!.set(work.tokens);
      if (work.kind === "copy") this.kv.copyBlocks(work.sources, work.destinations);
      if (work.kind !== "step") continue;
      this.#compute(work.batch, work.input);
      return true;
    }
  }

  #compute(batch: Batch, input: Int32Array): void {
    const memory = this.#memory.ints(batch.stepAddress);
    assert(Buffer.from(memory.buffer).equals(Buffer.from(input.buffer)), "the input changed under the device");
    const header = input.subarray(0, 12);
    this.stepRows.push(header[0]!);
    for (let i = 0; i < header[1]!; i++) this.#computeRows(input, i);
    const results = this.#memory.ints(batch.resultsAddress);
    for (let i = 0; i < header[2]!; i++) this.#sample(input, i, results.subarray(i * RESULT_INTS));
  }

  #sequence(input: Int32Array, index: number) {
    const at = input[3]! + index * 4;
    const [slot, rowBegin, rowCount, tableBegin] = input.subarray(at, at + 4) as unknown as number[];
    const position = input[input[5]! + rowBegin!]!;
    return {
      tokens: this.#tokens[slot!]!,
      position,
      rowBegin: rowBegin!,
      rowCount: rowCount!,
      blocks: input.subarray(input[6]! + tableBegin!),
    };
  }

  #computeRows(input: Int32Array, index: number): void {
    const { tokens, position, rowBegin, rowCount, blocks } = this.#sequence(input, index);
    for (let i = 0; i < rowCount; i++) {
      assert(input[input[4]! + rowBegin + i] === index, "a row of another sequence");
      assert(input[input[5]! + rowBegin + i] === position + i, "positions rise by one");
      const token = tokens[position + i]!;
      assert(token >= 0 && token < FAKE_VOCAB, `no token at position ${position + i}`);
      this.kv.compute(blocks, position + i, token);
    }
  }

  #sample(input: Int32Array, index: number, result: Int32Array): void {
    const at = input[8]! + index * 16;
    const floats = new Float32Array(input.buffer);
    const { tokens, position, rowBegin, blocks } = this.#sequence(input, input[at]!);
    const last = position + input[input[7]! + index]! - rowBegin;
    const kv = Array.from({ length: last + 1 }, (_, i) => this.kv.read(blocks, i));
    const seed = (input[at + 9]! >>> 0) + (input[at + 10]! >>> 0) * 2 ** 32;
    const token = nextToken(kv, { temperature: floats[at + 1]!, seed }, input[at + 11]!);
    result[0] = this.failsNextSample ? NOT_FINITE : token;
    this.failsNextSample = false;
    result[2] = 0;
    tokens[last + 1] = Math.max(0, result[0]);
  }
}
