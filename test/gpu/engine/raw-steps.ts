// Steps of a model without an engine: decode at a given batch and context, prefill of a prompt, layer-wise loads.

import { ModelRunner } from "../../../sidecar/engine/model-runner.ts";
import { warmUp } from "../../../sidecar/engine/warm-up.ts";
import { EventPool, LayerTransfer } from "../../../sidecar/kvcache/layer-transfer.ts";
import { Batch } from "../../../sidecar/model/batch.ts";
import type { Model } from "../../../sidecar/model/model.ts";
import { median, randomTokens } from "./bench-engine.ts";

const WAIT_US = 1_000_000;
/** A card that has rested so long computes a prompt at its full clock (100 ms are enough on an H200). */
const REST_MS = 300;

/** Speed of wrong numbers is worth nothing. */
function checkToken(batch: Batch, row: number, what: string): void {
  if (batch.result(row).token < 0) throw new Error(`${what}: the logits are not finite`);
}

export class RawSteps {
  readonly #runner: ModelRunner;
  readonly #batches: [Batch, Batch];
  readonly #blockTokens: number;

  constructor(
    readonly model: Model,
    readonly gpuBlocks: number,
    readonly maxRows: number,
    maxSequences: number,
  ) {
    this.#blockTokens = model.device.config.blockTokens;
    const maxBlocksPerSequence = Math.ceil((model.maxModelLen + 1) / this.#blockTokens);
    const limits = { maxRows, maxSequences, maxBlocksPerSequence, maxBiases: 16 };
    this.#batches = [new Batch(model.device, limits), new Batch(model.device, limits)];
    this.#runner = new ModelRunner(model, this.#batches);
  }

  /** Ms of what the sidecar does at start, before the first request. */
  warmUpMs(): number {
    const begin = performance.now();
    warmUp(this.#runner, this.gpuBlocks);
    return performance.now() - begin;
  }

  /** Block table of sequence `slot` for `length` positions; no block is shared. */
  table(slot: number, length: number): number[] {
    const count = Math.ceil(length / this.#blockTokens);
    const begin = slot * count;
    if (begin + count > this.gpuBlocks) throw new Error(`${begin + count} blocks, there are ${this.gpuBlocks}`);
    return Array.from({ length: count }, (_, i) => begin + i);
  }

  /** Computes positions [begin, end) of a sequence in chunks, so that its KV is real. */
  fill(slot: number, begin: number, end: number, table: readonly number[], chunk: number): void {
    const tokens = randomTokens(end - begin + 1, this.model.config.vocabSize);
    this.model.device.writeTokens(slot, begin, tokens);
    const batch = this.#batches[0];
    for (let at = begin; at < end; at += chunk) {
      batch.reset();
      const rowCount = Math.min(chunk, end - at);
      batch.add({
        slot, position: at, rowCount, blockTable: table, logits: at + rowCount === end ? "last" : "none",
        sampling: null, promptLength: end, rngPosition: end,
      });
      this.#runner.run(batch, null);
      this.#await(batch);
      if (at + rowCount === end) checkToken(batch, 0, `rows up to ${end}, the last ${rowCount} at once`);
    }
  }

  /**
   * Median ms of computing `rows` new tokens behind `history` that is in gpu memory: each after a rest, as a prompt
   * that comes alone, or one behind the other, where the card's power may be the limit.
   */
  prefillMs(history: number, rows: number, repeats: number, isRested: boolean): number {
    const table = this.table(0, history + rows + 1);
    if (history > 0) this.fill(0, 0, history, table, this.maxRows);
    const times: number[] = [];
    for (let i = 0; i <= repeats; i++) {
      if (isRested) this.#rest();
      const begin = performance.now();
      this.fill(0, history, history + rows, table, rows);
      if (i > 0) times.push(performance.now() - begin); // the first one picks algorithms
    }
    return median(times);
  }

  /** Median ms between steps that each decode one token of `count` sequences, one step ahead; and ms of one such step
   * enqueued over and over, so that the device never waits: what is between them, it waits for JavaScript. */
  decodeMs(count: number, context: number, steps: number): { stepMs: number; deviceMs: number } {
    const tables = Array.from({ length: count }, (_, slot) => this.table(slot, context + steps + 8));
    tables.forEach((table, slot) => this.fill(slot, 0, context, table, this.maxRows));
    const ends: number[] = [];
    for (let step = 0; step < steps; step++) {
      const batch = this.#batches[step % 2]!;
      if (step >= 2) {
        this.#await(batch);
        ends.push(performance.now());
        for (let row = 0; row < count; row++) checkToken(batch, row, `decode at ${context + step}, batch ${count}`);
      }
      this.#fillDecode(batch, tables, context, context + step);
      this.#runner.run(batch, null);
    }
    for (const batch of this.#batches) this.#await(batch);
    const intervals = ends.slice(4).map((end, i) => end - ends[i + 3]!);
    this.#fillDecode(this.#batches[0], tables, context, context + steps);
    return { stepMs: median(intervals), deviceMs: this.repeatedMs(steps) };
  }

  /** Median ms until all layers of `tokens` have come from host memory; the arena must be open. */
  loadMs(tokens: number, repeats: number): number {
    const count = tokens / this.#blockTokens;
    const slots = Int32Array.from({ length: count }, (_, i) => i);
    const { device, config } = this.model;
    const events = new EventPool(device);
    const times: number[] = [];
    for (let i = 0; i < repeats; i++) {
      const begin = performance.now();
      const load = new LayerTransfer(device, events, "load", slots, slots, config.layers, begin);
      while (!load.pump() || !load.isDone()) device.wait(WAIT_US / 1000);
      times.push(performance.now() - begin);
      load.dispose();
    }
    return median(times.slice(1));
  }

  #fillDecode(batch: Batch, tables: readonly (readonly number[])[], context: number, position: number): void {
    batch.reset();
    tables.forEach((blockTable, slot) =>
      batch.add({
        slot, position, rowCount: 1, blockTable, logits: "last",
        sampling: null, promptLength: context, rngPosition: position + 1,
      }),
    );
  }

  /** Ms of the last step of the first batch, enqueued over and over. */
  repeatedMs(steps: number): number {
    const { model } = this;
    const batch = this.#batches[0];
    this.#runner.run(batch, null);
    this.#await(batch);
    const begin = performance.now();
    for (let i = 0; i < steps; i++) {
      model.prepare(batch);
      model.forward(batch);
    }
    model.device.record("compute", batch.finished, true);
    this.#await(batch);
    return (performance.now() - begin) / steps;
  }

  #rest(): void {
    const end = performance.now() + REST_MS;
    while (performance.now() < end) this.model.device.wait(REST_MS * 1000);
  }

  #await(batch: Batch): void {
    while (!this.#runner.isFinished(batch)) this.model.device.wait(WAIT_US);
  }
}
