// Runs the engine's steps on a loaded model: the only place where engine and model touch.

import type { Batch } from "../model/batch.ts";
import type { ForwardHooks } from "../model/decoder.ts";
import type { Model } from "../model/model.ts";
import type { StepRunner } from "./engine.ts";

export class ModelRunner implements StepRunner {
  constructor(
    readonly model: Model,
    readonly batches: readonly Batch[],
  ) {}

  writeTokens(slot: number, tokens: Int32Array): void {
    this.model.device.writeTokens(slot, 0, tokens);
  }

  run(batch: Batch, hooks: ForwardHooks | null): void {
    if (hooks === null) this.model.prepare(batch);
    batch.seal();
    this.model.device.beginStep(batch.stepAddress, batch.stepBytes);
    this.model.forward(batch, hooks);
    this.model.device.record("compute", batch.finished, true);
  }

  isFinished(batch: Batch): boolean {
    return this.model.device.isDone(batch.finished);
  }
}
