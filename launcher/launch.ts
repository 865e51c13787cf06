// Starts all parts in order, watches them, and stops them in reverse. Whatever happens on the way, what was
// started is stopped again before this returns.

import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { checkPortFree } from "../config/port.ts";
import type { StopSignal } from "../config/stop-signal.ts";
import { startEmbeddedPostgres } from "../db/embedded-postgres.ts";
import { migrate } from "../db/migrate.ts";
import { buildNative } from "../sidecar/build-native.ts";
import { loadSecret } from "../sidecar/secret.ts";
import { describeReady } from "./banner.ts";
import { type LauncherConfig, secretPath } from "./config.ts";
import { lockDataDirectory } from "./data-directory.ts";
import { whenEdgeReady } from "./edge-endpoint.ts";
import { StartError } from "./start-error.ts";
import { Supervisor } from "./supervisor.ts";

/** A part's own limit comes first; this much later it is killed. */
const STOP_GRACE_MS = 5000;

export interface LaunchOptions {
  readonly stop: StopSignal;
  readonly say: (message: string) => void;
  /** Entry files; tests have others. */
  readonly programs?: { readonly edge: string; readonly sidecar: string };
  readonly build?: typeof buildNative;
}

/** Something that runs and has to be stopped; the last one started goes first. */
interface Part {
  readonly name: string;
  /** How it ended. */
  readonly exited: Promise<string>;
  stop(atOnce: AbortSignal): Promise<void>;
}

const PROGRAMS = {
  edge: fileURLToPath(new URL("../edge/main.ts", import.meta.url)),
  sidecar: fileURLToPath(new URL("../sidecar/main.ts", import.meta.url)),
};

/** Runs Kvasir until it is told to stop. Throws StartError, OptionError, or what a part throws, when it cannot. */
export async function launch(config: LauncherConfig, options: LaunchOptions): Promise<void> {
  const lock = lockDataDirectory(config.dataDirectory);
  const parts: Part[] = [];
  try {
    const { host, port } = config.edge;
    await checkPortFree(host, port);
    await startParts(config, options, parts);
    await untilStopped(parts, options.stop);
    options.say(
      `stopping: answers in progress have ${config.edge.drainTimeoutMs / 1000} s; Ctrl-C again cuts them off`,
    );
  } catch (error) {
    // Told to stop on the way up: that is no failure.
    if (!options.stop.orderly.aborted || error !== options.stop.orderly.reason) throw error;
  } finally {
    await stopParts(parts, options);
    lock.release();
  }
}

async function startParts(config: LauncherConfig, options: LaunchOptions, parts: Part[]): Promise<void> {
  const { stop, say, programs = PROGRAMS, build = buildNative } = options;
  const { dataDirectory, environment } = config;
  const stopTimeoutMs = config.edge.drainTimeoutMs + STOP_GRACE_MS;
  if (config.sidecarUrls === null) {
    await build(config.sidecar.backend, { onProgress: say, signal: stop.orderly });
  }

  const databaseUrl = config.databaseUrl ?? (await startPostgres(dataDirectory, say, parts));
  stop.orderly.throwIfAborted();
  await migrate(databaseUrl);
  stop.orderly.throwIfAborted();

  const secret = config.secret ?? ownSecret(dataDirectory);
  const shared = { ...environment, KVASIR_SIDECAR_SECRET: secret };
  const startService = async (
    name: "edge" | "sidecar",
    args: readonly string[],
    added: Readonly<Record<string, string>>,
  ) => {
    const service = new Supervisor({
      name,
      program: programs[name],
      arguments: args,
      environment: { ...shared, ...added },
      stopTimeoutMs,
      onLine: (line) => say(line.startsWith(name) ? line : `${name}: ${line}`),
      say,
    });
    parts.push(service);
    return await service.ready(stop.orderly);
  };
  const sidecarUrls = config.sidecarUrls ?? (await startService("sidecar", config.sidecarArguments, {}));
  const edgeUrl = await startService("edge", config.edgeArguments, {
    DATABASE_URL: databaseUrl,
    KVASIR_SIDECARS: sidecarUrls,
  });
  const models = await whenEdgeReady(edgeUrl, stop.orderly);
  say(describeReady(config, edgeUrl, models));
}

/** Throws StartError. */
function ownSecret(dataDirectory: string): string {
  try {
    return loadSecret(secretPath(dataDirectory));
  } catch (error) {
    throw new StartError((error as Error).message);
  }
}

async function startPostgres(
  dataDirectory: string,
  say: (message: string) => void,
  parts: Part[],
): Promise<string> {
  const directory = join(dataDirectory, "postgres");
  const server = await startEmbeddedPostgres({ directory, onProgress: say });
  if (server.isAdopted) say(`the database was still running (process ${server.pid})`);
  parts.push({ name: "database", exited: server.exited.then(() => "it is gone"), stop: () => server.stop() });
  return server.url;
}

/** Returns when told to stop. Throws StartError when a part ends by itself. */
async function untilStopped(parts: readonly Part[], { orderly }: StopSignal): Promise<void> {
  const stopped = new Promise<void>((resolve) => {
    orderly.addEventListener("abort", () => resolve(), { once: true });
    if (orderly.aborted) resolve();
  });
  const ended = parts.map(async ({ name, exited }) => {
    const how = await exited;
    if (!orderly.aborted) throw new StartError(`the ${name} ended unexpectedly (${how}): stopping the rest`);
  });
  await Promise.race([stopped, ...ended]);
}

async function stopParts(parts: readonly Part[], { stop, say }: LaunchOptions): Promise<void> {
  for (const part of parts.toReversed()) await part.stop(stop.atOnce);
  if (parts.length > 0) say("stopped");
}
