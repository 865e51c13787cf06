// The connection pool, and what it knows about the database's health. A query that meets a dead
// database fails with DatabaseUnavailable; from then on queries fail at once, without waiting for a
// time-out each, until a probe on a connection of its own has answered.

import { sql } from "drizzle-orm";
import { drizzle } from "drizzle-orm/postgres-js";
import type { PostgresJsDatabase } from "drizzle-orm/postgres-js";
import postgres from "postgres";

export type Orm = PostgresJsDatabase<Record<string, never>>;

/** The database cannot be reached, or did not answer in time. Nothing is known about the query. */
export class DatabaseUnavailable extends Error {
  override name = "DatabaseUnavailable";
}

export type DatabaseOptions = {
  url: string;
  /** Connections at most. */
  poolSize: number;
  connectTimeoutMs: number;
  /** Longest wait for one unit of work. */
  queryTimeoutMs: number;
  /** The server cancels a statement that takes longer: what timed out here must not succeed later. */
  statementTimeoutMs: number;
  /** Pause between probes while the database is down. */
  probeIntervalMs: number;
  /** Told once when the database goes away and once when it is back. */
  onChange?: (isUp: boolean, reason: string) => void;
};

export class Database {
  readonly #options: DatabaseOptions;
  #client: postgres.Sql;
  #orm: Orm;
  #isDown = false;
  #isClosed = false;
  #probe: Promise<boolean> | null = null;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #waiters: (() => void)[] = [];

  constructor(options: DatabaseOptions) {
    this.#options = options;
    this.#client = connect(options, options.poolSize);
    this.#orm = drizzle(this.#client);
  }

  /** True from the first failure to the next answered probe. */
  get isDown(): boolean {
    return this.#isDown;
  }

  /**
   * Runs one unit of work, a query or a transaction.
   * Throws DatabaseUnavailable, or what the work throws.
   */
  async run<T>(work: (orm: Orm) => Promise<T>, timeoutMs = this.#options.queryTimeoutMs): Promise<T> {
    if (this.#isDown) throw new DatabaseUnavailable("the database is down");
    const client = this.#client;
    try {
      return await within(work(this.#orm), timeoutMs);
    } catch (error) {
      if (!(error instanceof DatabaseUnavailable) && !isConnectionFailure(error)) throw error;
      const reason = connectionFailureReason(error);
      // A time-out may be one slow query: ask before the database is called down.
      if (!(error instanceof DatabaseUnavailable) || !(await this.#answers())) this.#goDown(client, reason);
      throw new DatabaseUnavailable(reason, { cause: error });
    }
  }

  /** Throws DatabaseUnavailable unless the database answers now. */
  async check(): Promise<void> {
    await this.run((orm) => orm.execute(sql`select 1`), this.#options.connectTimeoutMs);
  }

  /** Resolves when the database is not known to be down. Throws DatabaseUnavailable after the time. */
  async whenUp(timeoutMs: number): Promise<void> {
    if (!this.#isDown) return;
    await within(new Promise<void>((resolve) => this.#waiters.push(resolve)), timeoutMs);
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    await this.#client.end({ timeout: 1 });
  }

  #goDown(client: postgres.Sql, reason: string): void {
    if (this.#isDown || this.#isClosed || client !== this.#client) return;
    this.#isDown = true;
    this.#options.onChange?.(false, reason);
    // Connections of the old pool may hang for minutes: the pool starts anew.
    this.#client = connect(this.#options, this.#options.poolSize);
    this.#orm = drizzle(this.#client);
    void client.end({ timeout: 0 });
    this.#scheduleProbe();
  }

  #scheduleProbe(): void {
    this.#timer = setTimeout(async () => {
      const isUp = await this.#answers();
      if (this.#isClosed) return;
      if (!isUp) return this.#scheduleProbe();
      this.#isDown = false;
      for (const wake of this.#waiters.splice(0)) wake();
      this.#options.onChange?.(true, "the database answers again");
    }, this.#options.probeIntervalMs);
  }

  /** Whether a connection of its own gets an answer; calls at the same time share one probe. */
  #answers(): Promise<boolean> {
    this.#probe ??= this.#askOnce().finally(() => {
      this.#probe = null;
    });
    return this.#probe;
  }

  async #askOnce(): Promise<boolean> {
    const client = connect(this.#options, 1);
    try {
      await within(client`select 1`, this.#options.connectTimeoutMs);
      return true;
    } catch {
      return false; // why it failed does not matter: only an answer counts
    } finally {
      void client.end({ timeout: 0 });
    }
  }
}

/** A pool of at most `poolSize` connections, opened when needed. */
export function connect(
  options: Pick<DatabaseOptions, "url" | "connectTimeoutMs"> & { statementTimeoutMs?: number },
  poolSize: number,
): postgres.Sql {
  return postgres(options.url, {
    max: poolSize,
    connect_timeout: options.connectTimeoutMs / 1000,
    backoff: () => 0.1,
    onnotice: () => {},
    connection: {
      application_name: "kvasir-edge",
      statement_timeout: options.statementTimeoutMs ?? 0,
    },
  });
}

/** SQLSTATE or driver code of a database error, also when the query builder wrapped it; "" if none. */
export function errorCode(error: unknown): string {
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    const { code } = cause as { code?: unknown };
    if (typeof code === "string") return code;
  }
  return "";
}

/** Driver codes, system errors, and the SQLSTATEs of a server that goes away or has no room. */
const CONNECTION_FAILURE = /^(CONNECT|ECONN|ENOTFOUND|EAI_|EPIPE|ETIMEDOUT|EHOST|ENET|08|57P0|53300)/;

export function isConnectionFailure(error: unknown): boolean {
  return error instanceof DatabaseUnavailable || CONNECTION_FAILURE.test(errorCode(error));
}

function connectionFailureReason(error: unknown): string {
  if (error instanceof DatabaseUnavailable) return error.message;
  return `the database cannot be reached (${errorCode(error)})`;
}

/** Rejects with DatabaseUnavailable after `timeoutMs`; the work itself is left to end by itself. */
async function within<T>(work: PromiseLike<T>, timeoutMs: number): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    const error = new DatabaseUnavailable(`the database did not answer within ${timeoutMs} ms`);
    timer = setTimeout(() => reject(error), timeoutMs);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}
