// A model without a device: the KV of a position hashes its token, its place in the view and the position before it, in
// each of several layers, and the next token hashes all KV that the block table shows. A wrong table, a block reused
// too early, a copy that came too late, a position or a token out of place changes every token that follows, so tests
// need only compare texts.

import { assert } from "../../sidecar/assert.ts";
import type { StepRunner } from "../../sidecar/engine/engine.ts";
import type { EngineSampling } from "../../sidecar/engine/request.ts";
import type { TruncationRule } from "../../sidecar/kvcache/view.ts";
import { Batch, type BatchLimits } from "../../sidecar/model/batch.ts";
import type { ForwardHooks } from "../../sidecar/model/decoder.ts";
import type { Device } from "../../sidecar/native.ts";
import { FakeDevice, STREAMS } from "./fake-device.ts";

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

/** KV of a position of the view in one layer, given that of the position before. */
export function kvOf(before: number, token: number, position: number, layer: number): number {
  return mix(mix(mix(before, token + 1), position + 101), layer + 7);
}

export function mix(state: number, value: number): number {
  const mixed = Math.imul(state ^ value, 0x9e3779b1) >>> 0;
  return (mixed ^ (mixed >>> 15)) >>> 0;
}

/** What the model sees of `tokens`: the KV of each position of the view, by layer, computed token by token. */
export class ReferenceView {
  /** [layer][position] */
  readonly kv: number[][];
  #drops = 0;
  #length = 0;

  constructor(
    readonly layers: number,
    readonly rule: TruncationRule,
  ) {
    this.kv = Array.from({ length: layers }, () => []);
  }

  append(token: number): void {
    if (this.#drops < this.rule.dropsBefore(this.#length)) {
      const kept = this.rule.keepBlocks * this.rule.blockTokens;
      for (const layer of this.kv) layer.splice(kept, this.rule.dropTokens);
      this.#drops++;
    }
    this.#length++;
    this.kv.forEach((values, layer) => values.push(kvOf(values.at(-1) ?? 0, token, values.length, layer)));
  }

  nextToken(sampling: FakeSampling): number {
    return nextToken(this.kv, sampling, this.#length);
  }
}

function nextToken(
  kv: readonly (readonly number[])[],
  sampling: FakeSampling,
  rngPosition: number,
): number {
  let logits = 17;
  for (const layer of kv) for (const value of layer) logits = mix(logits, value);
  if (sampling.temperature > 0) logits = mix(mix(logits, sampling.seed % 2 ** 31), rngPosition);
  return logits % FAKE_VOCAB;
}

/** What the model answers when nothing is cached, batched, cut or preempted. */
export function referenceAnswer(
  prompt: ArrayLike<number>,
  { maxTokens, sampling }: { maxTokens: number; sampling: FakeSampling & { ignoreEos: boolean } },
  view: ReferenceView,
): { tokens: number[]; reason: "stop" | "length" } {
  for (let i = 0; i < prompt.length; i++) view.append(prompt[i]!);
  const answer: number[] = [];
  while (answer.length < maxTokens) {
    const token = view.nextToken(sampling);
    if (token === FAKE_EOS && !sampling.ignoreEos) return { tokens: answer, reason: "stop" };
    view.append(token);
    answer.push(token);
  }
  return { tokens: answer, reason: "length" };
}

export class FakeRunner implements StepRunner {
  readonly batches: readonly Batch[];
  /** Rows of each step that ran. */
  readonly stepRows: number[] = [];
  /** The next sample is -1: the logits were not finite. */
  failsNextSample = false;
  readonly #inFlight = new Set<Batch>();
  #stepsDone = 0;
  readonly #tokens: Int32Array[];

  constructor(
    readonly device: FakeDevice,
    limits: BatchLimits,
    batchCount = 2,
  ) {
    this.batches = Array.from({ length: batchCount }, () => new Batch(device as unknown as Device, limits));
    const longest = limits.maxBlocksPerSequence * device.blockTokens + 1;
    this.#tokens = Array.from({ length: limits.maxSequences }, () => new Int32Array(longest).fill(-1));
  }

  writeTokens(slot: number, tokens: Int32Array): void {
    const copy = tokens.slice();
    this.device.enqueue("compute", () => this.#tokens[slot]!.set(copy));
  }

  run(batch: Batch, hooks: ForwardHooks | null): void {
    assert(this.isFinished(batch), "a batch is used again while the device still works on it");
    batch.seal();
    this.#inFlight.add(batch);
    const input = this.#ints(batch.stepAddress, batch.stepBytes).slice();
    for (let layer = 0; layer < this.device.layers; layer++) {
      hooks?.beforeAttention(layer);
      this.device.enqueue("compute", () => this.#computeLayer(input, layer));
      hooks?.afterLayer(layer);
    }
    this.device.enqueue("compute", () => this.#finish(batch, input));
  }

  isFinished(batch: Batch): boolean {
    return !this.#inFlight.has(batch);
  }

  get stepsInFlight(): number {
    return this.#inFlight.size;
  }

  /** Does what is queued up to the end of the oldest step; the copy streams move only if that waits for them. */
  finishStep(): boolean {
    if (this.#inFlight.size === 0) return false;
    for (const target = this.#stepsDone + 1; this.#stepsDone < target; ) {
      if (this.device.advance("compute")) continue;
      const hasMoved = STREAMS.some((stream) => stream !== "compute" && this.device.advance(stream));
      assert(hasMoved, "the compute stream waits for ever");
    }
    return true;
  }

  #ints(address: Batch["stepAddress"], bytes: number): Int32Array {
    const view = this.device.memory.view(address, bytes);
    return new Int32Array(view.buffer, view.byteOffset, bytes / 4);
  }

  #computeLayer(input: Int32Array, layer: number): void {
    for (let index = 0; index < input[1]!; index++) {
      const { tokens, position, rowBegin, rowCount, blocks } = this.#sequence(input, index);
      for (let i = 0; i < rowCount; i++) {
        assert(input[input[4]! + rowBegin + i] === index, "a row of another sequence");
        assert(input[input[5]! + rowBegin + i] === position + i, "positions rise by one");
        const token = tokens[position + i]!;
        assert(token >= 0 && token < FAKE_VOCAB, `no token at position ${position + i}`);
        const before = position + i === 0 ? 0 : this.device.read(blocks, layer, position + i - 1);
        this.device.write(blocks, layer, position + i, kvOf(before, token, position + i, layer));
      }
    }
  }

  #finish(batch: Batch, input: Int32Array): void {
    const now = this.#ints(batch.stepAddress, batch.stepBytes);
    assert(now.every((word, i) => word === input[i]), "the input changed under the device");
    this.stepRows.push(input[0]!);
    const results = this.#ints(batch.resultsAddress, input[2]! * RESULT_INTS * 4);
    for (let i = 0; i < input[2]!; i++) this.#sample(input, i, results.subarray(i * RESULT_INTS));
    this.#inFlight.delete(batch);
    this.#stepsDone++;
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

  #sample(input: Int32Array, index: number, result: Int32Array): void {
    const at = input[8]! + index * 16;
    const floats = new Float32Array(input.buffer, input.byteOffset);
    const { tokens, position, rowBegin, blocks } = this.#sequence(input, input[at]!);
    const last = position + input[input[7]! + index]! - rowBegin;
    const kv = Array.from({ length: this.device.layers }, (_, layer) =>
      Array.from({ length: last + 1 }, (_, i) => this.device.read(blocks, layer, i)),
    );
    const seed = (input[at + 9]! >>> 0) + (input[at + 10]! >>> 0) * 2 ** 32;
    const token = nextToken(kv, { temperature: floats[at + 1]!, seed }, input[at + 11]!);
    result[0] = this.failsNextSample ? NOT_FINITE : token;
    this.failsNextSample = false;
    result[2] = 0;
    tokens[last + 1] = Math.max(0, result[0]);
  }
}
