// An engine whose cached blocks can be put where a bench wants them: in gpu memory, in host memory, on disk alone.

import type { CachedBlock } from "../../sidecar/kvcache/cached-block.ts";
import { ABSENT } from "../../sidecar/kvcache/cached-block.ts";
import type { FinishEvent } from "../../sidecar/engine/request.ts";
import { ModelEngine, type ModelEngineOptions } from "../support/model-engine.ts";
import { SeededRandom } from "../support/seeded-random.ts";

export type Place = "gpu" | "host" | "disk";

/** Tokens that no other seed has. */
export function randomText(length: number, seed: number, vocabSize: number): number[] {
  const random = new SeededRandom(seed);
  return Array.from({ length }, () => random.integer(6, vocabSize - 1));
}

export class PlacedEngine {
  #nextSalt = 1;

  private constructor(readonly engine: ModelEngine) {}

  static async open(options: ModelEngineOptions): Promise<PlacedEngine> {
    return new PlacedEngine(await ModelEngine.open({ ...options, clock: "real" }));
  }

  /** Moves all cached blocks; nothing may run. */
  place(place: Place): void {
    const { cache } = this.engine;
    if (place === "gpu") return;
    if (place === "host") {
      const onGpuAlone = this.#blocks().filter(({ gpu, host }) => gpu !== ABSENT && host === ABSENT);
      cache.moves.descend(onGpuAlone, this.engine.nowMs);
      this.#settle();
    } else {
      this.flush();
    }
    for (const block of this.#blocks()) {
      if (block.gpu !== ABSENT) cache.residency.leaveGpu(block, "evicted");
      if (place === "disk" && block.host !== ABSENT) cache.residency.evictHost(block);
    }
  }

  /** Everything goes to disk, as at an orderly stop. */
  flush(): void {
    while (this.engine.cache.flush(this.engine.nowMs)) this.engine.turn();
  }

  /** Asks for one token; what the request adds to the whole blocks of the history is dropped; all, if it is afresh. */
  probe(history: ArrayLike<number>, added: readonly number[], isAfresh: boolean): FinishEvent {
    const salt = new Uint8Array(32);
    if (isAfresh) new DataView(salt.buffer).setUint32(0, this.#nextSalt++);
    const { finish } = this.engine.ask([...Array.from(history), ...added], { maxTokens: 1, salt });
    this.#settle();
    const kept = isAfresh ? 0 : Math.floor(history.length / this.engine.cache.blockTokens);
    this.engine.engine.forget(finish.blockIds.slice(kept));
    this.engine.answers.clear();
    return finish;
  }

  #blocks(): CachedBlock[] {
    return [...this.engine.cache.residency.index.blocks()];
  }

  #settle(): void {
    while (this.engine.cache.moves.inFlight > 0) this.engine.turn();
  }
}
