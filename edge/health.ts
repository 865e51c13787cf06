// GET /healthz: the process is alive. GET /readyz: it can answer: the database and a sidecar do.

import type { Context } from "hono";
import type { Services } from "./services.ts";

export function getHealth(c: Context): Response {
  return c.json({ status: "ok" });
}

export async function getReadiness(c: Context, services: Services): Promise<Response> {
  const { database, drain, log, sidecars } = services;
  const hasDatabase = await database.check().then(
    () => true,
    (error: unknown) => {
      log.debug({ reason: (error as Error).message }, "not ready: the database does not answer");
      return false;
    },
  );
  const isReady = hasDatabase && sidecars.isReady && !drain.isDraining;
  const body = {
    status: isReady ? "ready" : "not_ready",
    database: hasDatabase,
    sidecars: sidecars.clients.map(({ name, isReady, model }) => ({
      name,
      ready: isReady,
      model: model?.id ?? null,
    })),
    draining: drain.isDraining,
  };
  return c.json(body, isReady ? 200 : 503);
}
