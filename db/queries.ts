// Questions and changes around accounts and conversations; turns are in turns.ts. Each function is
// one query or one transaction, and knows only the Orm it is given.

import { and, asc, desc, eq, isNull, lt, sql } from "drizzle-orm";
import type { Orm } from "./client.ts";
import {
  accounts,
  conversations,
  conversationSidecars,
  messages,
  pendingDeletes,
} from "./schema.ts";
import { uuidv7 } from "./uuid.ts";

export type Account = { id: string; salt: Uint8Array<ArrayBuffer> };

export type Conversation = {
  id: string;
  headMessageId: string | null;
  metadata: Record<string, string>;
  createdAt: Date;
};

export type NewMessage = { role: string; content: string; name?: string | undefined };

export type StoredMessage = {
  id: string;
  parentId: string | null;
  role: string;
  name: string | null;
  content: string;
  tokenCount: number | null;
  contextTokenCount: number | null;
  /** Unix seconds. */
  createdAtS: number;
};

export async function findAccount(orm: Orm, name: string): Promise<Account | null> {
  const [row] = await orm
    .select({ id: accounts.id, salt: accounts.salt })
    .from(accounts)
    .where(eq(accounts.name, name));
  return row ?? null;
}

/** A new conversation, which may begin with messages. */
export async function createConversation(
  orm: Orm,
  accountId: string,
  metadata: Record<string, string>,
  initial: NewMessage[],
): Promise<Conversation> {
  return await orm.transaction(async (tx) => {
    const id = uuidv7();
    const rows = messageRows(id, null, null, initial);
    const headMessageId = rows.at(-1)?.id ?? null;
    const [row] = await tx
      .insert(conversations)
      .values({ id, accountId, metadata, headMessageId })
      .returning({ createdAt: conversations.createdAt });
    if (rows.length > 0) await tx.insert(messages).values(rows);
    return { id, headMessageId, metadata, createdAt: row!.createdAt };
  });
}

export async function findConversation(
  orm: Orm,
  accountId: string,
  id: string,
): Promise<Conversation | null> {
  const [row] = await orm
    .select(conversationFields)
    .from(conversations)
    .where(isLive(accountId, id));
  return row ?? null;
}

/** Newest first; `before` is the last id of the page before this one. */
export async function listConversations(
  orm: Orm,
  accountId: string,
  limit: number,
  before: string | null,
): Promise<Conversation[]> {
  const { id, deletedAt } = conversations;
  const isWanted = and(
    eq(conversations.accountId, accountId),
    isNull(deletedAt),
    before === null ? undefined : lt(id, before),
  );
  return await orm
    .select(conversationFields)
    .from(conversations)
    .where(isWanted)
    .orderBy(desc(id))
    .limit(limit);
}

/** Replaces what is noted about the conversation; null when there is no such one. */
export async function setMetadata(
  orm: Orm,
  accountId: string,
  id: string,
  metadata: Record<string, string>,
): Promise<Conversation | null> {
  const [row] = await orm
    .update(conversations)
    .set({ metadata, updatedAt: sql`now()` })
    .where(isLive(accountId, id))
    .returning(conversationFields);
  return row ?? null;
}

/** The messages from the first one to `leafId`, in order; empty when the leaf is not there. */
export async function loadBranch(
  orm: Orm,
  conversationId: string,
  leafId: string,
): Promise<StoredMessage[]> {
  return await orm.execute<StoredMessage>(sql`
    WITH RECURSIVE branch AS (
      SELECT m.*, 0 AS height FROM messages m
      WHERE m.id = ${leafId} AND m.conversation_id = ${conversationId}
      UNION ALL
      SELECT m.*, branch.height + 1 FROM messages m JOIN branch ON m.id = branch.parent_id
    )
    SELECT id, parent_id AS "parentId", role, name, content, token_count AS "tokenCount",
      context_token_count AS "contextTokenCount",
      floor(extract(epoch FROM created_at))::float8 AS "createdAtS"
    FROM branch ORDER BY height DESC`);
}

/**
 * Removes the conversation's messages and marks it deleted; every sidecar that ever served it gets a
 * pending delete. Returns these sidecars, or null when there is no such conversation.
 */
export async function deleteConversation(
  orm: Orm,
  accountId: string,
  id: string,
): Promise<string[] | null> {
  return await orm.transaction(async (tx) => {
    const rows = await tx
      .update(conversations)
      .set({
        deletedAt: sql`now()`,
        updatedAt: sql`now()`,
        headMessageId: null,
        metadata: {},
        activeRequestId: null,
        leaseExpiresAt: null,
      })
      .where(isLive(accountId, id))
      .returning({ id: conversations.id });
    if (rows.length === 0) return null;
    await tx.delete(messages).where(eq(messages.conversationId, id));
    return await insertPendingDeletes(tx, id);
  });
}

/** A turn that was running while its conversation was deleted may have left new blocks: forget again. */
export async function renewPendingDeletes(orm: Orm, conversationId: string): Promise<string[]> {
  const [row] = await orm
    .select({ deletedAt: conversations.deletedAt })
    .from(conversations)
    .where(eq(conversations.id, conversationId));
  if (row === undefined || row.deletedAt === null) return [];
  return await insertPendingDeletes(orm, conversationId);
}

/** What this sidecar must still forget, oldest first. */
export async function listPendingDeletes(
  orm: Orm,
  sidecar: string,
  limit: number,
): Promise<{ conversationId: string; salt: Uint8Array<ArrayBuffer> }[]> {
  return await orm
    .select({ conversationId: pendingDeletes.conversationId, salt: accounts.salt })
    .from(pendingDeletes)
    .innerJoin(conversations, eq(conversations.id, pendingDeletes.conversationId))
    .innerJoin(accounts, eq(accounts.id, conversations.accountId))
    .where(eq(pendingDeletes.sidecar, sidecar))
    .orderBy(asc(pendingDeletes.createdAt))
    .limit(limit);
}

/** The sidecar has acknowledged. */
export async function removePendingDelete(
  orm: Orm,
  sidecar: string,
  conversationId: string,
): Promise<void> {
  await orm
    .delete(pendingDeletes)
    .where(
      and(eq(pendingDeletes.sidecar, sidecar), eq(pendingDeletes.conversationId, conversationId)),
    );
}

/** Rows for messages that follow each other under `parentId`, with fresh ids. */
export function messageRows(
  conversationId: string,
  parentId: string | null,
  requestId: string | null,
  contents: NewMessage[],
): (typeof messages.$inferInsert)[] {
  let parent = parentId;
  return contents.map(({ role, content, name }) => {
    const id = uuidv7();
    const row = { id, conversationId, parentId: parent, requestId, role, content, name };
    parent = id;
    return row;
  });
}

const conversationFields = {
  id: conversations.id,
  headMessageId: conversations.headMessageId,
  metadata: conversations.metadata,
  createdAt: conversations.createdAt,
};

function isLive(accountId: string, id: string) {
  return and(
    eq(conversations.id, id),
    eq(conversations.accountId, accountId),
    isNull(conversations.deletedAt),
  );
}

async function insertPendingDeletes(orm: Orm, conversationId: string): Promise<string[]> {
  const rows = await orm
    .select({ sidecar: conversationSidecars.sidecar })
    .from(conversationSidecars)
    .where(eq(conversationSidecars.conversationId, conversationId));
  const sidecars = rows.map((row) => row.sidecar);
  if (sidecars.length > 0) {
    await orm
      .insert(pendingDeletes)
      .values(sidecars.map((sidecar) => ({ sidecar, conversationId })))
      .onConflictDoNothing();
  }
  return sidecars;
}
