// Checks before any route: the Host header, because a web page may point its own name at 127.0.0.1 (DNS
// rebinding) and read our answers then; and no new work while the server is stopping.

import type { MiddlewareHandler } from "hono";
import { ApiError } from "./errors.ts";
import type { DrainState } from "./services.ts";

/** Lets requests in that call us by a known name; null: by any. */
export function requireHost(allowedHosts: ReadonlySet<string> | null): MiddlewareHandler {
  return async (c, next) => {
    const host = c.req.header("host") ?? "";
    const name = host.replace(/:\d+$/, "").toLowerCase();
    if (allowedHosts !== null && !allowedHosts.has(name)) {
      const message = `The host "${name}" is not served here; --allowed-hosts adds it.`;
      throw new ApiError(403, "host_not_allowed", message);
    }
    await next();
  };
}

export function refuseWhileDraining(drain: DrainState): MiddlewareHandler {
  return async (_c, next) => {
    if (drain.isDraining) {
      const message = "The server is shutting down. Try again.";
      throw new ApiError(503, "shutting_down", message, { retryAfterS: 1 });
    }
    await next();
  };
}
