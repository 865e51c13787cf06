// Asks each sidecar once a minute what it has to say about itself, and keeps that in the database, so that
// "how full was the cache yesterday" is a question for psql.

import type { Database } from "../db/client.ts";
import { recordSidecarStats } from "../db/sidecar-stats.ts";
import type { Log } from "./log.ts";
import type { SidecarClient } from "./sidecar-client.ts";

const INTERVAL_MS = 60_000;

export class StatsSampler {
  readonly #database: Database;
  readonly #log: Log;
  readonly #clients: () => readonly SidecarClient[];
  readonly #timer: ReturnType<typeof setInterval>;

  constructor(database: Database, log: Log, clients: () => readonly SidecarClient[]) {
    this.#database = database;
    this.#log = log;
    this.#clients = clients;
    this.#timer = setInterval(() => void this.sample(), INTERVAL_MS);
  }

  /** One sample of each sidecar that is there; what cannot be had or kept is left out. */
  async sample(): Promise<void> {
    const ready = this.#clients().filter((client) => client.isReady);
    await Promise.all(ready.map((client) => this.#sampleOne(client)));
  }

  close(): void {
    clearInterval(this.#timer);
  }

  async #sampleOne(client: SidecarClient): Promise<void> {
    try {
      const stats = await client.stats();
      await this.#database.run((orm) => recordSidecarStats(orm, client.name, stats));
    } catch (error) {
      this.#log.debug({ sidecar: client.name, reason: (error as Error).message }, "no sample of its statistics");
    }
  }
}
