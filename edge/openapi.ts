// GET /openapi.json, from the same schemas that parse the requests.

import type { OpenAPIHono } from "@hono/zod-openapi";
import { z } from "@hono/zod-openapi";
import * as schemas from "./api-schemas.ts";
import { chatRequest } from "./chat-request.ts";
import { conversationRequest, conversationUpdate } from "./conversations.ts";

const json = (schema: z.ZodType) => ({ "application/json": { schema } });
const error = (description: string) => ({ description, content: json(schemas.errorResponse) });
const soon = (description: string) => ({
  ...error(description),
  headers: { "Retry-After": { description: "seconds", schema: { type: "integer" as const } } },
});

/** What each error's status says. */
const ERRORS = {
  400: error("The request cannot be served as it is"),
  401: error("The API key is missing or wrong"),
  403: error("A host or an origin that is not allowed"),
  404: error("There is no such model, conversation or message"),
  408: error("The body did not come in time"),
  409: error("The conversation has another turn in progress, or the turn could not be stored"),
  413: error("The body is too large"),
  415: error("The body is compressed or no JSON"),
  429: soon("Too much is in progress"),
  500: error("A fault of the server"),
  503: soon("The database or a sidecar is away, or the server is shutting down"),
  504: error("The time for the answer was up"),
};

function errors(...statuses: (keyof typeof ERRORS)[]) {
  const all = [...statuses, 401, 403, 500, 503] as const;
  return Object.fromEntries(all.map((status) => [status, ERRORS[status]]));
}

const NO_KEY = { security: [] };
const id = z.object({ id: z.string() });

/** Adds every route to the document. */
export function describeRoutes(app: OpenAPIHono): void {
  const { openAPIRegistry: registry } = app;
  registry.registerComponent("securitySchemes", "key", {
    type: "http", scheme: "bearer", description: "KVASIR_API_KEY, where the server has one",
  });
  const answer = (description: string, schema: z.ZodType) => ({ description, content: json(schema) });
  registry.registerPath({
    method: "post",
    path: "/v1/chat/completions",
    summary: "Answer a chat, or the next turn of a conversation",
    request: { body: { required: true, content: json(chatRequest) } },
    responses: {
      200: {
        description: "A chat.completion, or with stream: true its chunks as server-sent events",
        content: {
          ...json(schemas.chatCompletion),
          "text/event-stream": { schema: z.string() },
        },
      },
      ...errors(400, 404, 408, 409, 413, 415, 429, 504),
    },
  });
  registry.registerPath({
    method: "post",
    path: "/v1/conversations",
    summary: "Begin a conversation",
    request: { body: { content: json(conversationRequest) } },
    responses: {
      200: answer("The conversation", schemas.conversation), ...errors(400, 404, 408, 413, 415),
    },
  });
  registry.registerPath({
    method: "get",
    path: "/v1/conversations",
    summary: "List conversations, newest first",
    request: {
      query: z.object({ after: z.string().optional(), limit: z.coerce.number().optional() }),
    },
    responses: { 200: answer("One page", schemas.conversationList), ...errors(400, 404) },
  });
  const one = { path: "/v1/conversations/{id}", request: { params: id } };
  registry.registerPath({
    ...one,
    method: "get",
    summary: "A conversation with the messages of its current branch",
    responses: { 200: answer("The conversation", schemas.conversationWithMessages), ...errors(404) },
  });
  for (const method of ["post", "patch"] as const) {
    registry.registerPath({
      ...one,
      method,
      summary: "Replace the metadata of a conversation",
      request: { ...one.request, body: { required: true, content: json(conversationUpdate) } },
      responses: {
        200: answer("The conversation", schemas.conversation), ...errors(400, 404, 408, 413, 415),
      },
    });
  }
  registry.registerPath({
    ...one,
    method: "delete",
    summary: "Delete a conversation, its messages and its cache",
    responses: { 200: answer("Deleted", schemas.conversationDeleted), ...errors(404) },
  });
  registry.registerPath({
    method: "get",
    path: "/v1/models",
    summary: "The models that are served",
    responses: { 200: answer("The models", schemas.modelList), ...errors() },
  });
  registry.registerPath({
    method: "get",
    path: "/v1/models/{id}",
    summary: "One model",
    request: { params: id },
    responses: { 200: answer("The model", schemas.model), ...errors(404) },
  });
  registry.registerPath({
    method: "get",
    path: "/metrics",
    summary: "Counters and histograms, for Prometheus",
    responses: {
      200: { description: "Exposition format 0.0.4", content: { "text/plain": { schema: z.string() } } },
      ...errors(),
    },
  });
  registry.registerPath({
    method: "get",
    path: "/healthz",
    ...NO_KEY,
    summary: "The process is alive",
    responses: { 200: answer("Alive", schemas.health) },
  });
  registry.registerPath({
    method: "get",
    path: "/readyz",
    ...NO_KEY,
    summary: "The database and a sidecar answer",
    responses: {
      200: answer("Ready", schemas.readiness),
      503: answer("Not ready", schemas.readiness),
    },
  });
}

export const OPENAPI_INFO = {
  openapi: "3.1.0",
  info: {
    title: "Kvasir",
    version: "0.1.0",
    description: "An OpenAI-compatible chat API that keeps the KV cache of every conversation.",
  },
  security: [{}, { key: [] }] as Record<string, string[]>[],
};
