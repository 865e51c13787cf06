// GET /openapi.json, from the same schemas that parse the requests.

import type { OpenAPIHono } from "@hono/zod-openapi";
import { z } from "@hono/zod-openapi";
import * as schemas from "./api-schemas.ts";
import { chatRequest } from "./chat-request.ts";
import { conversationRequest, conversationUpdate } from "./conversations.ts";

const json = (schema: z.ZodType) => ({ "application/json": { schema } });
const failed = { description: "OpenAI's error object", content: json(schemas.errorResponse) };
const id = z.object({ id: z.string() });

/** Adds every route to the document. */
export function describeRoutes(app: OpenAPIHono): void {
  const { openAPIRegistry: registry } = app;
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
      default: failed,
    },
  });
  registry.registerPath({
    method: "post",
    path: "/v1/conversations",
    summary: "Begin a conversation",
    request: { body: { content: json(conversationRequest) } },
    responses: { 200: answer("The conversation", schemas.conversation), default: failed },
  });
  registry.registerPath({
    method: "get",
    path: "/v1/conversations",
    summary: "List conversations, newest first",
    request: {
      query: z.object({ after: z.string().optional(), limit: z.coerce.number().optional() }),
    },
    responses: { 200: answer("One page", schemas.conversationList), default: failed },
  });
  const one = { path: "/v1/conversations/{id}", request: { params: id } };
  registry.registerPath({
    ...one,
    method: "get",
    summary: "A conversation with the messages of its current branch",
    responses: { 200: answer("The conversation", schemas.conversationWithMessages), default: failed },
  });
  for (const method of ["post", "patch"] as const) {
    registry.registerPath({
      ...one,
      method,
      summary: "Replace the metadata of a conversation",
      request: { ...one.request, body: { required: true, content: json(conversationUpdate) } },
      responses: { 200: answer("The conversation", schemas.conversation), default: failed },
    });
  }
  registry.registerPath({
    ...one,
    method: "delete",
    summary: "Delete a conversation, its messages and its cache",
    responses: { 200: answer("Deleted", schemas.conversationDeleted), default: failed },
  });
  registry.registerPath({
    method: "get",
    path: "/v1/models",
    summary: "The models that are served",
    responses: { 200: answer("The models", schemas.modelList), default: failed },
  });
  registry.registerPath({
    method: "get",
    path: "/v1/models/{id}",
    summary: "One model",
    request: { params: id },
    responses: { 200: answer("The model", schemas.model), default: failed },
  });
  registry.registerPath({
    method: "get",
    path: "/metrics",
    summary: "Counters and histograms, for Prometheus",
    responses: { 200: { description: "Exposition format 0.0.4", content: { "text/plain": { schema: z.string() } } } },
  });
  registry.registerPath({
    method: "get",
    path: "/healthz",
    summary: "The process is alive",
    responses: { 200: answer("Alive", schemas.health) },
  });
  registry.registerPath({
    method: "get",
    path: "/readyz",
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
};
