// `bun run edge` and `deno task edge`: migrates the database, connects to the sidecars, serves the API,
// and on SIGTERM or SIGINT finishes the answers in progress before it ends.

import process from "node:process";
import { OptionError } from "../config/options.ts";
import { toldToStop } from "../config/stop-signal.ts";
import { DatabaseUnavailable } from "../db/client.ts";
import { DatabaseRefused, SchemaTooNew } from "../db/migrate.ts";
import { createApp } from "./app.ts";
import { edgeHelp, isLoopback, publicConfig, readEdgeConfig } from "./config.ts";
import { serve } from "./serve.ts";
import type { Services } from "./services.ts";
import { startServices } from "./start-services.ts";

async function main(): Promise<void> {
  const config = readEdgeConfig(process.argv.slice(2), process.env);
  if (config === null) {
    console.log(edgeHelp());
    return;
  }
  const { services, pendingDeletes, close } = await startServices(config);
  services.log.info(publicConfig(config), "configuration");
  if (!isLoopback(config.host) && config.apiKey === null) {
    services.log.warn({ host: config.host }, "anyone who reaches the port may use it: set KVASIR_API_KEY");
  }
  try {
    const app = createApp(services, pendingDeletes);
    const { port, stop } = serve({ hostname: config.host, port: config.port, fetch: app.fetch });
    const host = config.host.includes(":") ? `[${config.host}]` : config.host;
    console.log(`edge listening on http://${host}:${port}`);
    await toldToStop(process.env["KVASIR_PARENT_PIPE"] === "1");
    await drain(services, stop);
  } finally {
    await close();
  }
}

/** After the limit answers are cut; clients that still do not read are left behind after this. */
const CUT_GRACE_MS = 1000;

/** Lets the answers in progress end, and cuts those that take longer than the limit. */
async function drain({ config, drain, log }: Services, stop: () => Promise<void>): Promise<void> {
  log.info({ answers: drain.inFlight }, "stopping");
  const limit = setTimeout(() => drain.cut(), config.drainTimeoutMs);
  await atMost(drain.begin(), config.drainTimeoutMs + CUT_GRACE_MS);
  clearTimeout(limit);
  await atMost(stop(), CUT_GRACE_MS);
}

/** Waits for the work, but no longer than the time. */
async function atMost(work: Promise<void>, timeoutMs: number): Promise<void> {
  const { promise: isLate, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, timeoutMs);
  await Promise.race([work, isLate]);
  clearTimeout(timer);
}

/** The port is taken, or may not be had. */
function isListenError(error: unknown): boolean {
  const { code } = error as { code?: unknown };
  return typeof code === "string" && /^(EADDR|EACCES)/.test(code);
}

if (import.meta.main) {
  try {
    await main();
    process.exit(0);
  } catch (error) {
    const isForPeople =
      error instanceof OptionError ||
      error instanceof DatabaseUnavailable ||
      error instanceof DatabaseRefused ||
      error instanceof SchemaTooNew ||
      isListenError(error);
    console.error("edge:", isForPeople ? (error as Error).message : error);
    process.exit(1);
  }
}
