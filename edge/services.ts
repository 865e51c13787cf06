// What the request handlers share: made once at start (main.ts), or by a test.

import type { Database } from "../db/client.ts";
import type { Account } from "../db/queries.ts";
import type { EdgeConfig } from "./config.ts";
import type { Log } from "./log.ts";
import type { Metrics } from "./metrics.ts";
import type { SidecarPool } from "./sidecar-pool.ts";
import type { TurnKeeper } from "./turn-keeper.ts";

export type Services = {
  readonly config: EdgeConfig;
  readonly database: Database;
  readonly sidecars: SidecarPool;
  readonly turns: TurnKeeper;
  /** Of every request, until there are keys. */
  readonly account: Account;
  readonly log: Log;
  readonly metrics: Metrics;
  readonly drain: DrainState;
};

/** The answers in progress, and a stop that waits for them while it refuses new ones. */
export class DrainState {
  /** How to end each answer in progress. */
  readonly #cuts = new Set<() => void>();
  #isDraining = false;
  #isCut = false;
  #idle: (() => void)[] = [];

  get isDraining(): boolean {
    return this.#isDraining;
  }

  get inFlight(): number {
    return this.#cuts.size;
  }

  /** True once the limit of a stop has passed. */
  get isCut(): boolean {
    return this.#isCut;
  }

  /** An answer begins, and can be ended by `cut`; returns what to call when it has ended. */
  enter(cut: () => void): () => void {
    this.#cuts.add(cut);
    return () => {
      this.#cuts.delete(cut);
      if (this.#cuts.size === 0) for (const resolve of this.#idle.splice(0)) resolve();
    };
  }

  /** Ends the answers in progress. */
  cut(): void {
    this.#isCut = true;
    for (const cut of this.#cuts) cut();
  }

  /** Resolves when no answer is in progress. */
  async whenIdle(): Promise<void> {
    if (this.#cuts.size > 0) await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  /** Refuses new requests from now on; resolves when no answer is in progress any more. */
  async begin(): Promise<void> {
    this.#isDraining = true;
    await this.whenIdle();
  }
}
