// What the request handlers share: made once at start (main.ts), or by a test.

import type { Database } from "../db/client.ts";
import type { Account } from "../db/queries.ts";
import type { EdgeConfig } from "./config.ts";
import type { Log } from "./log.ts";
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
  readonly drain: DrainState;
};

/** A stop in progress: new requests are refused, the last answer to end resolves `idle`. */
export class DrainState {
  #inFlight = 0;
  #isDraining = false;
  readonly #idle = Promise.withResolvers<void>();
  /** Fires when answers in progress must end now. */
  readonly cut = new AbortController();

  get isDraining(): boolean {
    return this.#isDraining;
  }

  get inFlight(): number {
    return this.#inFlight;
  }

  enter(): void {
    this.#inFlight++;
  }

  leave(): void {
    this.#inFlight--;
    this.#settle();
  }

  /** Resolves when no answer is in progress any more. */
  async begin(): Promise<void> {
    this.#isDraining = true;
    this.#settle();
    await this.#idle.promise;
  }

  #settle(): void {
    if (this.#isDraining && this.#inFlight === 0) this.#idle.resolve();
  }
}
