// Whether a port can be had: asked before anything that takes long is started.

import { createServer } from "node:net";
import { OptionError } from "./options.ts";

/** Throws OptionError when nobody could listen there. */
export async function checkPortFree(host: string, port: number): Promise<void> {
  const probe = createServer();
  const error = await new Promise<NodeJS.ErrnoException | null>((resolve) => {
    probe.once("error", resolve);
    probe.listen(port, host, () => probe.close(() => resolve(null)));
  });
  if (error === null) return;
  switch (error.code) {
    case "EADDRINUSE":
      throw new OptionError(
        `port ${port} of ${host} is taken: stop what listens there, or choose another with --port`,
      );
    case "EACCES":
      throw new OptionError(`port ${port} is not for ordinary users: choose one above 1023 with --port`);
    default:
      throw new OptionError(`cannot listen on ${host} (${error.message}): choose another --host or --port`);
  }
}
