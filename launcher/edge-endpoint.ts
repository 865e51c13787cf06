// The edge seen from outside: whether it can answer, and under which address.

import { StartError } from "./start-error.ts";

const POLL_MS = 50;
const READY_TIMEOUT_MS = 30_000;

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
