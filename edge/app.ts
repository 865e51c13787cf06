// All routes and middleware, in order. No logic here: each handler is in the file of its family.

import { OpenAPIHono } from "@hono/zod-openapi";
import { requestId } from "hono/request-id";
import { routePath } from "hono/route";
import { secureHeaders } from "hono/secure-headers";
import { requireApiKey } from "./auth.ts";
import { abortError, postChatCompletion } from "./chat-completions.ts";
import { CompletionAborted } from "./completion-stream.ts";
import {
  getConversation,
  getConversations,
  postConversation,
  removeConversation,
  updateConversation,
} from "./conversations.ts";
import { ApiError, errorResponse, toApiError } from "./errors.ts";
import { getMetrics } from "./get-metrics.ts";
import { refuseWhileDraining, requireHost } from "./guards.ts";
import { getHealth, getReadiness } from "./health.ts";
import { getModel, getModels } from "./models.ts";
import { describeRoutes, OPENAPI_INFO } from "./openapi.ts";
import type { PendingDeletes } from "./pending-deletes.ts";
import type { Services } from "./services.ts";

export function createApp(services: Services, pendingDeletes: PendingDeletes): OpenAPIHono {
  const { config, drain, log, metrics } = services;
  const app = new OpenAPIHono();

  app.use(requestId());
  app.use(async (c, next) => {
    await next();
    metrics.countHttp(c.req.method, routePath(c), c.res.status);
  });
  app.use(secureHeaders({ strictTransportSecurity: false })); // TLS is the proxy's business
  app.get("/healthz", getHealth);
  app.get("/readyz", (c) => getReadiness(c, services));

  app.use(requireHost(config.allowedHosts));
  app.doc31("/openapi.json", OPENAPI_INFO);
  app.use("/metrics", requireApiKey(config.apiKey));
  app.get("/metrics", (c) => getMetrics(c, services));
  app.use("/v1/*", refuseWhileDraining(drain));
  app.use("/v1/*", requireApiKey(config.apiKey));
  app.post("/v1/chat/completions", (c) => postChatCompletion(c, services));
  app.get("/v1/models", (c) => getModels(c, services));
  app.get("/v1/models/:id{.+}", (c) => getModel(c, services));
  app.post("/v1/conversations", (c) => postConversation(c, services));
  app.get("/v1/conversations", (c) => getConversations(c, services));
  app.get("/v1/conversations/:id", (c) => getConversation(c, services));
  app.on(["POST", "PATCH"], "/v1/conversations/:id", (c) => updateConversation(c, services));
  app.delete("/v1/conversations/:id", (c) => removeConversation(c, services, pendingDeletes));
  describeRoutes(app);

  app.notFound((c) => {
    const message = `There is no ${c.req.method} ${c.req.path}.`;
    return errorResponse(c, new ApiError(404, "unknown_url", message));
  });
  app.onError((error, c) => {
    const known = error instanceof CompletionAborted ? abortError(drain.isCut) : toApiError(error);
    const fields = { request: c.get("requestId"), code: known.code, err: known.cause ?? error };
    if (known.status === 500) log.error(fields, known.message);
    else log.debug(fields, known.message);
    return errorResponse(c, known);
  });
  return app;
}
