// Listening, on Bun and on Deno: the one place where the runtimes differ. Both abort a request's signal
// when its client leaves, but Deno 2.9 does not look at a connection again whose request body came in a
// packet of its own until the answer is written: there, only streams end at once; a plain answer ends at
// its deadline.

export type Listener = {
  hostname: string;
  port: number;
  fetch: (request: Request) => Response | Promise<Response>;
};

export type Listening = {
  port: number;
  /** Takes no new connections; resolves when the last request has been answered. */
  stop(): Promise<void>;
};

type DenoNamespace = {
  serve(
    options: { hostname: string; port: number; onListen: () => void },
    fetch: Listener["fetch"],
  ): { addr: { port: number }; shutdown(): Promise<void> };
};

/** Throws when the address cannot be had. */
export function serve({ hostname, port, fetch }: Listener): Listening {
  const deno = (globalThis as { Deno?: DenoNamespace }).Deno;
  if (deno !== undefined) {
    const server = deno.serve({ hostname, port, onListen: () => {} }, fetch);
    return { port: server.addr.port, stop: () => server.shutdown() };
  }
  // Bun closes connections that are silent for 10 s unless told not to; ours wait for tokens.
  const server = Bun.serve({ hostname, port, fetch, idleTimeout: 0 });
  return { port: server.port!, stop: () => server.stop() };
}
