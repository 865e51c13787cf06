// One long text read through a context window in three ways, which differ in what becomes of the KV when the window is
// full and its oldest blocks leave it: kept and moved down (ours), computed again from the tokens that are left, or
// kept with keys that stay turned by their old positions (the negative control). Each says how well it foretold the
// tokens.

import type { HostArena } from "../../sidecar/native.ts";
import { hostView } from "../../sidecar/native.ts";
import type { Rope } from "../../sidecar/model/rope.ts";
import { TruncationRule } from "../../sidecar/kvcache/view.ts";
import type { TestModel, TestSequence } from "../support/test-model.ts";
import { mean } from "./statistics.ts";

/** Mean negative log-likelihood in nats of the tokens between two drops, by reader. */
export interface Segment {
  readonly kept: Float64Array;
  readonly recomputed: Float64Array;
  /** Null where it was not asked for. */
  readonly control: Float64Array | null;
}

const ROWS = 256;
const WAIT_US = 10_000_000;

export class TruncatedReader {
  readonly rule: TruncationRule;
  readonly #arena: HostArena;
  #spare: number[] = [];
  readonly #control: number[];

  constructor(
    readonly model: TestModel,
    rule: ConstructorParameters<typeof TruncationRule>[0],
  ) {
    this.rule = new TruncationRule(rule);
    const { windowBlocks } = this.rule;
    this.#arena = model.model.device.openHostArena(null, windowBlocks);
    this.#control = Array.from({ length: 2 * windowBlocks }, (_, i) => windowBlocks + i);
  }

  /** Reads the text to its end; whole segments only. */
  *read(text: Int32Array, controlEvery: number): Generator<Segment> {
    const { windowTokens, windowBlocks, dropTokens } = this.rule;
    this.model.reset();
    this.#spare = Array.from({ length: windowBlocks }, (_, i) => i);
    const view = this.model.sequence();
    this.#advance(view, text.subarray(0, windowTokens));
    for (let end = windowTokens, count = 0; end + dropTokens <= text.length; end += dropTokens, count++) {
      // The token that the last position foretells is the first one of the segment: all readers miss it.
      const next = text.subarray(end, end + dropTokens);
      const control = count % controlEvery === 0 ? this.#readWithOldKeys(view, next) : null;
      const recomputed = this.#recompute(text, end, next);
      this.#drop(view);
      yield { kept: this.#advance(view, next), recomputed, control };
    }
  }

  [Symbol.dispose](): void {
    this.model.model.device.closeHostArena(true);
  }

  /** The engine's way: the oldest blocks leave the table. */
  #drop(view: TestSequence): void {
    const { keepBlocks, dropBlocks, dropTokens } = this.rule;
    this.#spare.push(...view.table.splice(keepBlocks, dropBlocks));
    view.position -= dropTokens;
  }

  /** What is left of the text's last window is computed from position 0 on. */
  #recompute(text: Int32Array, end: number, next: Int32Array): Float64Array {
    const { keepBlocks, dropBlocks, blockTokens, windowTokens } = this.rule;
    const kept = keepBlocks * blockTokens;
    // The prefix that never leaves is the text's own beginning.
    const rest = text.subarray(end - windowTokens + kept + dropBlocks * blockTokens, end);
    const view = { slot: 1, table: this.#control.slice(), position: 0 };
    this.model.prefill(view, Int32Array.from([...text.subarray(0, kept), ...rest]));
    return this.#advance(view, next);
  }

  /** The kept blocks at their new places, with keys turned as they were at the old ones. */
  #readWithOldKeys(view: TestSequence, next: Int32Array): Float64Array {
    const { keepBlocks, dropBlocks, dropTokens } = this.rule;
    const moved = view.table.slice(keepBlocks + dropBlocks);
    const copies = this.#control.slice(0, moved.length);
    turnedCopies(this.model, this.#arena, moved, copies, dropTokens);
    const table = [...view.table.slice(0, keepBlocks), ...copies, ...this.#control.slice(moved.length)];
    return this.#advance({ slot: 2, table, position: view.position - dropTokens }, next);
  }

  /** Two blocks in the other order, their keys turned to where they were, mean the same: the model does not see it. */
  checkTurning(text: Int32Array): number {
    const { blockTokens } = this.rule;
    const [first, second, third] = this.#control as [number, number, number];
    const end = 2 * blockTokens;
    this.model.prefill({ slot: 0, table: [first, second], position: 0 }, text.subarray(0, end));
    const next = text.subarray(end, end + blockTokens);
    const expected = mean(this.#advance({ slot: 0, table: [first, second, third], position: end }, next));
    const swapped = this.#control.slice(3, 5);
    turnedCopies(this.model, this.#arena, [second], swapped.slice(0, 1), blockTokens);
    turnedCopies(this.model, this.#arena, [first], swapped.slice(1), -blockTokens);
    const actual = mean(this.#advance({ slot: 0, table: [...swapped, third], position: end }, next));
    return Math.abs(actual - expected);
  }

  /** Negative log-likelihood of each token but the first. */
  #advance(view: TestSequence, tokens: Int32Array): Float64Array {
    const { vocabSize } = this.model.model.config;
    const losses = new Float64Array(tokens.length - 1);
    const blocks = Math.ceil((view.position + tokens.length) / this.rule.blockTokens);
    while (view.table.length < blocks) {
      const block = this.#spare.pop();
      if (block === undefined) throw new Error("a view holds more than its window");
      view.table.push(block);
    }
    for (let at = 0; at < tokens.length; at += ROWS) {
      const [logits] = this.model.step([{ sequence: view, ids: tokens.subarray(at, at + ROWS) }]);
      for (let i = at; i < Math.min(at + ROWS, losses.length); i++) {
        losses[i] = lossOf(logits!, (i - at) * vocabSize, vocabSize, tokens[i + 1]!);
      }
    }
    return losses;
  }
}

/** -log softmax(logits[begin ... begin + size])[token] */
function lossOf(logits: Float32Array, begin: number, size: number, token: number): number {
  let peak = -Infinity;
  for (let i = begin; i < begin + size; i++) if (logits[i]! > peak) peak = logits[i]!;
  let sum = 0;
  for (let i = begin; i < begin + size; i++) sum += Math.exp(logits[i]! - peak);
  return Math.log(sum) + peak - logits[begin + token]!;
}

/**
 * Copies KV blocks with every key turned on by `positions`: at place j of a view such a block is seen as if it lay
 * `positions` further. The keys are bf16 and are rounded once more.
 */
function turnedCopies(
  { model: { device, config } }: TestModel,
  arena: HostArena,
  sources: readonly number[],
  copies: readonly number[],
  positions: number,
): void {
  const { blockBytes, slotBytes } = device.blockBytes();
  const slots = Int32Array.from(sources, (_, i) => i);
  const event = device.createEvent();
  const finish = () => {
    while (!device.isDone(event)) device.wait(WAIT_US);
  };
  const { layers, kvHeads, headDim, rope } = config;
  for (let layer = 0; layer < layers; layer++) {
    device.saveLayer(layer, Int32Array.from(sources), slots, event);
    finish();
  }
  const { blockTokens } = device.config;
  const memory = hostView(arena.slotsAddress, sources.length * slotBytes);
  const layerBytes = blockBytes / layers;
  for (const slot of slots) {
    for (let layer = 0; layer < layers; layer++) {
      // [K|V][kv head][token][head dim]
      const count = kvHeads * blockTokens * headDim;
      const keys = new Uint16Array(memory, slot * slotBytes + layer * layerBytes, count);
      for (let at = 0; at < count; at += headDim) turnKey(keys.subarray(at, at + headDim), rope!, positions);
    }
  }
  for (let layer = 0; layer < layers; layer++) {
    device.loadLayer(layer, slots, Int32Array.from(copies), event);
    finish();
  }
}

function turnKey(key: Uint16Array, rope: Rope, positions: number): void {
  const pairs = rope.rotaryDim / 2;
  for (let i = 0; i < pairs; i++) {
    const angle = positions * rope.inverseFrequencies[i]!;
    const [a, b] = [fromBf16(key[i]!), fromBf16(key[i + pairs]!)];
    key[i] = toBf16(a * Math.cos(angle) - b * Math.sin(angle));
    key[i + pairs] = toBf16(a * Math.sin(angle) + b * Math.cos(angle));
  }
}

const word = new DataView(new ArrayBuffer(4));

function fromBf16(bits: number): number {
  word.setUint32(0, bits * 65536);
  return word.getFloat32(0);
}

/** To nearest, ties to even. */
function toBf16(value: number): number {
  word.setFloat32(0, value);
  const bits = word.getUint32(0);
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}
