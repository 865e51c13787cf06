// Makes what the request handlers share: the migrated database, the sidecars' connections, and the
// keepers of turns and deletes.

import { Database } from "../db/client.ts";
import { migrate } from "../db/migrate.ts";
import { uuidv7 } from "../db/uuid.ts";
import { loadDefaultAccount } from "./auth.ts";
import type { EdgeConfig } from "./config.ts";
import { openLog } from "./log.ts";
import { Metrics } from "./metrics.ts";
import { PendingDeletes } from "./pending-deletes.ts";
import { DrainState, type Services } from "./services.ts";
import { SidecarClient } from "./sidecar-client.ts";
import { SidecarPool } from "./sidecar-pool.ts";
import { StatsSampler } from "./stats-sampler.ts";
import { TurnKeeper } from "./turn-keeper.ts";

const CONNECT_TIMEOUT_MS = 3000;
const PROBE_INTERVAL_MS = 500;
/** The server gives up on a statement before the edge does, so that the edge hears of it. */
const STATEMENT_SHARE = 0.8;

export type StartedServices = {
  services: Services;
  pendingDeletes: PendingDeletes;
  close: () => Promise<void>;
};

/** Connects to everything; sidecars may come later. Throws DatabaseUnavailable or SchemaTooNew. */
export async function startServices(config: EdgeConfig): Promise<StartedServices> {
  const log = openLog(config.logLevel);
  await migrate(config.databaseUrl, CONNECT_TIMEOUT_MS);
  const database = new Database({
    url: config.databaseUrl,
    poolSize: config.databasePool,
    connectTimeoutMs: CONNECT_TIMEOUT_MS,
    queryTimeoutMs: config.databaseTimeoutMs,
    statementTimeoutMs:
      STATEMENT_SHARE * Math.min(config.databaseTimeoutMs, config.commitTimeoutMs),
    probeIntervalMs: PROBE_INTERVAL_MS,
    onChange: (isUp, reason) => {
      log.warn({ isUp }, reason);
      if (!isUp) return;
      pendingDeletes.sendSoon();
      void turns.releaseClaims();
    },
  });
  const account = await loadDefaultAccount(database);
  const edgeName = `edge-${uuidv7()}`;
  const clients: SidecarClient[] = [];
  const pendingDeletes = new PendingDeletes(database, log, () => clients);
  const sampler = new StatsSampler(database, log, () => clients);
  const sidecars = new SidecarPool(clients);
  const turns = new TurnKeeper({
    database,
    log,
    leaseMs: config.leaseMs,
    commitTimeoutMs: config.commitTimeoutMs,
    onDeleted: (names) => pendingDeletes.sendSoon(names),
  });
  for (const url of config.sidecarUrls) {
    clients.push(
      new SidecarClient({
        url,
        secret: config.sidecarSecret,
        edgeName,
        log,
        onHello: async (client) => {
          refuseSameName(client, clients);
          await pendingDeletes.send(client);
        },
        onChange: () => sidecars.wake(),
      }),
    );
  }
  const metrics = new Metrics();
  const services = { config, database, sidecars, turns, account, log, metrics, drain: new DrainState() };
  const close = async () => {
    pendingDeletes.close();
    sampler.close();
    turns.close();
    sidecars.close();
    await database.close();
  };
  return { services, pendingDeletes, close };
}

/** Caches and pending deletes are kept under a sidecar's name: two must not share one. */
function refuseSameName(client: SidecarClient, clients: readonly SidecarClient[]): void {
  const other = clients.find(({ name, url }) => name === client.name && url !== client.url);
  if (other === undefined) return;
  throw new Error(`its name "${client.name}" is that of ${other.url}: start it with another --name`);
}
