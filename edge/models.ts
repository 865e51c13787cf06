// GET /v1/models: what the sidecars serve.

import type { Context } from "hono";
import type { ModelInfo } from "../sidecar/protocol.ts";
import type { Services } from "./services.ts";

export function getModels(c: Context, { sidecars }: Services): Response {
  return c.json({ object: "list", data: [...sidecars.models.values()].map(modelBody) });
}

export async function getModel(c: Context, { sidecars }: Services): Promise<Response> {
  return c.json(modelBody(await sidecars.findModel(c.req.param("id") ?? "")));
}

function modelBody({ id, created, maxModelLen }: ModelInfo) {
  return { id, object: "model", created, owned_by: "kvasir", max_model_len: maxModelLen };
}
