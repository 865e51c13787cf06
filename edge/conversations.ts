// /v1/conversations: made, read, listed, changed, deleted. Shapes follow OpenAI's conversations where it has
// them; the messages of the current branch come along.

import { z } from "@hono/zod-openapi";
import type { Context } from "hono";
import type { Conversation, StoredMessage } from "../db/queries.ts";
import {
  createConversation,
  deleteConversation,
  findConversation,
  listConversations,
  loadBranch,
  setMetadata,
} from "../db/queries.ts";
import { isUuid } from "../db/uuid.ts";
import { noCalls, ROLES, storableText, textContent } from "./chat-request.ts";
import { LIMITS } from "./config.ts";
import { invalidRequest } from "./errors.ts";
import { readJson } from "./json-body.ts";
import type { PendingDeletes } from "./pending-deletes.ts";
import type { Services } from "./services.ts";
import { conversationNotFound, orUnavailable } from "./turn-keeper.ts";

/** Without calls of tools there is nothing for a tool to answer, and most templates refuse it. */
const ITEM_ROLES = ROLES.filter((role) => role !== "tool");
const roleError = ({ input }: { input?: unknown }) =>
  input === "tool" ? "tools are not supported" : `must be one of ${ITEM_ROLES.join(", ")}`;

const item = z.object({
  type: z.literal("message").optional(),
  role: z.enum(ITEM_ROLES, { error: roleError }),
  ...noCalls,
  content: textContent(["text", "input_text", "output_text"]),
  name: storableText.max(64).optional(),
});

const metadata = z
  .record(storableText.max(64), storableText.max(512))
  .refine((pairs) => Object.keys(pairs).length <= 16, { error: "at most 16 pairs" });

export const conversationRequest = z
  .object({
    /** The messages it begins with, under OpenAI's name or ours. */
    items: z.array(item).max(LIMITS.messages).nullish(),
    messages: z.array(item).max(LIMITS.messages).nullish(),
    metadata: metadata.nullish(),
  })
  .openapi("CreateConversationRequest");

/** OpenAI's update: the metadata as a whole. A title is metadata, too. */
export const conversationUpdate = z.object({ metadata }).openapi("UpdateConversationRequest");

export async function postConversation(c: Context, services: Services): Promise<Response> {
  const { account, config, database } = services;
  const body = await readJson(c.req.raw, conversationRequest, config.bodyLimitBytes);
  const initial = [...(body.items ?? []), ...(body.messages ?? [])];
  const made = await orUnavailable(
    database.run((orm) => createConversation(orm, account.id, body.metadata ?? {}, initial)),
  );
  return c.json(conversationBody(made));
}

export async function getConversation(c: Context, services: Services): Promise<Response> {
  const { account, database } = services;
  const id = conversationParam(c);
  const found = await orUnavailable(
    database.run(async (orm) => {
      const conversation = await findConversation(orm, account.id, id);
      if (conversation === null) return null;
      const leaf = conversation.headMessageId;
      return { conversation, branch: leaf === null ? [] : await loadBranch(orm, id, leaf) };
    }),
  );
  if (found === null) throw conversationNotFound(id);
  return c.json({
    ...conversationBody(found.conversation),
    messages: found.branch.map(messageBody),
  });
}

export async function getConversations(c: Context, services: Services): Promise<Response> {
  const { account, database } = services;
  const after = c.req.query("after") ?? null;
  if (after !== null && !isUuid(after)) throw invalidRequest("after: must be a conversation id", "after");
  const limit = Number(c.req.query("limit") ?? 20);
  if (!Number.isInteger(limit) || limit < 1 || limit > LIMITS.listPage) {
    throw invalidRequest(`limit: must be an integer from 1 to ${LIMITS.listPage}`, "limit");
  }
  // One more than wanted tells whether there are more.
  const rows = await orUnavailable(
    database.run((orm) => listConversations(orm, account.id, limit + 1, after)),
  );
  const page = rows.slice(0, limit);
  return c.json({
    object: "list",
    data: page.map(conversationBody),
    first_id: page[0]?.id ?? null,
    last_id: page.at(-1)?.id ?? null,
    has_more: rows.length > limit,
  });
}

/** POST as OpenAI has it, or PATCH. */
export async function updateConversation(c: Context, services: Services): Promise<Response> {
  const { account, config, database } = services;
  const id = conversationParam(c);
  const { metadata } = await readJson(c.req.raw, conversationUpdate, config.bodyLimitBytes);
  const changed = await orUnavailable(database.run((orm) => setMetadata(orm, account.id, id, metadata)));
  if (changed === null) throw conversationNotFound(id);
  return c.json(conversationBody(changed));
}

export async function removeConversation(
  c: Context,
  services: Services,
  pendingDeletes: PendingDeletes,
): Promise<Response> {
  const { account, database } = services;
  const id = conversationParam(c);
  const sidecars = await orUnavailable(
    database.run((orm) => deleteConversation(orm, account.id, id)),
  );
  if (sidecars === null) throw conversationNotFound(id);
  const { blocks, pendingSidecars } = await pendingDeletes.forgetNow(sidecars, account.salt, id);
  const kvasir = { blocks, pending_sidecars: pendingSidecars };
  return c.json({ id, object: "conversation.deleted", deleted: true, kvasir });
}

function conversationParam(c: Context): string {
  const id = c.req.param("id") ?? "";
  if (!isUuid(id)) throw conversationNotFound(id);
  return id.toLowerCase();
}

function conversationBody({ id, metadata, createdAt, headMessageId }: Conversation) {
  return {
    id,
    object: "conversation",
    created_at: Math.floor(createdAt.getTime() / 1000),
    metadata,
    head_message_id: headMessageId,
  };
}

function messageBody(message: StoredMessage) {
  return {
    id: message.id,
    object: "conversation.message",
    role: message.role,
    ...(message.name !== null && { name: message.name }),
    content: message.content,
    parent_id: message.parentId,
    token_count: message.tokenCount,
    created_at: message.createdAtS,
  };
}
