// The edge seen from outside: whether its port can be had, and whether it can answer.

import { createServer } from "node:net";
import { StartError } from "./start-error.ts";

const POLL_MS = 50;
const READY_TIMEOUT_MS = 30_000;

/** Throws StartError when nobody could listen there; said before anything is started. */
export async function checkPortFree(host: string, port: number): Promise<void> {
  const probe = createServer();
  const error = await new Promise<NodeJS.ErrnoException | null>((resolve) => {
    probe.once("error", resolve);
    probe.listen(port, host, () => probe.close(() => resolve(null)));
  });
  if (error === null) return;
  switch (error.code) {
    case "EADDRINUSE":
      throw new StartError(
        `port ${port} of ${host} is taken: stop what listens there, or choose another with --port`,
      );
    case "EACCES":
      throw new StartError(`port ${port} is not for ordinary users: choose one above 1023 with --port`);
    default:
      throw new StartError(`cannot listen on ${host} (${error.message}): choose another --host or --port`);
  }
}

/** Waits until the edge is connected to database and sidecar. Returns the names of the models. Throws StartError. */
export async function whenEdgeReady(edgeUrl: string, signal: AbortSignal): Promise<string[]> {
  const deadline = Date.now() + READY_TIMEOUT_MS;
  const url = `${reachable(edgeUrl)}/readyz`;
  while (Date.now() < deadline) {
    signal.throwIfAborted();
    const response = await fetch(url, { signal });
    const body = (await response.json()) as { sidecars: { model: string | null }[] };
    if (response.ok) return body.sidecars.flatMap(({ model }) => model ?? []);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  throw new StartError(`the edge did not get ready within ${READY_TIMEOUT_MS / 1000} s: see ${url}`);
}

/** "Any address" is one to listen on, not one to call. */
export function reachable(url: string): string {
  return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:");
}
