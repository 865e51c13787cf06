// A turn of a conversation: claimed before the generation, stored after it. The claim is a lease on
// the conversation's row, so a second turn is refused before it costs anything, and an edge that dies
// blocks its conversations no longer than the lease. The commit is a compare-and-set on the claim.

import { and, eq, inArray, isNull, lt, or, sql } from "drizzle-orm";
import type { Orm } from "./client.ts";
import type { NewMessage, StoredMessage } from "./queries.ts";
import { loadBranch, messageRows } from "./queries.ts";
import { conversations, conversationSidecars, messages, requests } from "./schema.ts";
import { uuidv7 } from "./uuid.ts";

export type RequestRow = typeof requests.$inferInsert;

/** What a claimed turn continues. */
export type Claim = {
  conversationId: string;
  requestId: string;
  /** Null for the first message of the conversation. */
  parentId: string | null;
  /** Sidecar of the last turn. */
  sidecar: string | null;
  history: StoredMessage[];
};

export type ClaimResult = Claim | "not_found" | "busy" | "parent_not_found";

export type TurnAnswer = { content: string; tokenCount: number | null };

export type Turn = {
  claim: Claim;
  request: RequestRow;
  newMessages: NewMessage[];
  /** One per choice: siblings, of which the first becomes the head. */
  answers: TurnAnswer[];
};

/** Ids under which a turn was stored. */
export type StoredTurn = { inputIds: string[]; outputIds: string[] };

/** Another turn, or a delete, came between the claim and the commit. */
export class TurnConflict extends Error {
  override name = "TurnConflict";
}

/**
 * Takes the conversation for one turn, from its head or from `parentId` (a message of the tree).
 * The lease must be renewed before `leaseMs` has passed.
 */
export async function claimTurn(
  orm: Orm,
  options: {
    accountId: string;
    conversationId: string;
    requestId: string;
    parentId?: string | undefined;
    leaseMs: number;
  },
): Promise<ClaimResult> {
  const { accountId, conversationId, requestId, leaseMs } = options;
  const isMine = and(
    eq(conversations.id, conversationId),
    eq(conversations.accountId, accountId),
    isNull(conversations.deletedAt),
  );
  const isFree = or(
    isNull(conversations.activeRequestId),
    lt(conversations.leaseExpiresAt, sql`now()`),
  );
  return await orm.transaction(async (tx) => {
    const [row] = await tx
      .update(conversations)
      .set({ activeRequestId: requestId, leaseExpiresAt: leaseEnd(leaseMs) })
      .where(and(isMine, isFree))
      .returning({ head: conversations.headMessageId, sidecar: conversations.sidecar });
    if (row === undefined) {
      const found = await tx.select({ id: conversations.id }).from(conversations).where(isMine);
      return found.length === 0 ? "not_found" : "busy";
    }
    const parentId = options.parentId ?? row.head;
    const history = parentId === null ? [] : await loadBranch(tx, conversationId, parentId);
    if (parentId !== null && history.length === 0) {
      await clearClaim(tx, conversationId, requestId);
      return "parent_not_found";
    }
    return { conversationId, requestId, parentId, sidecar: row.sidecar, history };
  });
}

/** The turns that are still running keep their conversations. */
export async function renewLeases(orm: Orm, requestIds: string[], leaseMs: number): Promise<void> {
  await orm
    .update(conversations)
    .set({ leaseExpiresAt: leaseEnd(leaseMs) })
    .where(inArray(conversations.activeRequestId, requestIds));
}

/** Gives the claims of ended requests back. */
export async function releaseClaims(orm: Orm, requestIds: string[]): Promise<void> {
  await orm
    .update(conversations)
    .set({ activeRequestId: null, leaseExpiresAt: null })
    .where(inArray(conversations.activeRequestId, requestIds));
}

/** Before a sidecar sees the conversation: whoever may hold its blocks must be known to a delete. */
export async function recordPlacement(orm: Orm, claim: Claim, sidecar: string): Promise<void> {
  if (claim.sidecar === sidecar) return;
  const { conversationId } = claim;
  await orm.transaction(async (tx) => {
    await tx.insert(conversationSidecars).values({ conversationId, sidecar }).onConflictDoNothing();
    await tx.update(conversations).set({ sidecar }).where(eq(conversations.id, conversationId));
  });
}

/**
 * Stores a turn and its request row, moves the head and gives the claim back, all or nothing. May be
 * tried again with the same turn when it is not known whether it was stored.
 * Throws TurnConflict.
 */
export async function commitTurn(orm: Orm, turn: Turn): Promise<StoredTurn> {
  const { claim, request, newMessages, answers } = turn;
  const inputs = messageRows(claim.conversationId, claim.parentId, claim.requestId, newMessages);
  const answerParent = inputs.at(-1)?.id ?? claim.parentId;
  const outputs = answers.map(({ content, tokenCount }) => ({
    id: uuidv7(),
    conversationId: claim.conversationId,
    parentId: answerParent,
    requestId: claim.requestId,
    role: "assistant",
    content,
    tokenCount,
    contextTokenCount: sumOrNull(request.promptTokens, tokenCount),
  }));
  countInputTokens(inputs, claim, request.promptTokens ?? null);
  return await orm.transaction(async (tx) => {
    const moved = await tx
      .update(conversations)
      .set({
        headMessageId: outputs[0]?.id ?? answerParent,
        activeRequestId: null,
        leaseExpiresAt: null,
        updatedAt: sql`now()`,
      })
      .where(
        and(
          eq(conversations.id, claim.conversationId),
          eq(conversations.activeRequestId, claim.requestId),
        ),
      )
      .returning({ id: conversations.id });
    if (moved.length === 0) return await findStoredTurn(tx, claim);
    await tx.insert(messages).values([...inputs, ...outputs]);
    await tx.insert(requests).values(request);
    return { inputIds: inputs.map((row) => row.id), outputIds: outputs.map((row) => row.id) };
  });
}

/** Stores the row of a request that left no turn, and gives its claim back. False: claim was lost. */
export async function endRequest(
  orm: Orm,
  request: RequestRow,
  claim: Claim | null,
): Promise<boolean> {
  const insert = (tx: Orm) => tx.insert(requests).values(request).onConflictDoNothing();
  if (claim === null) {
    await insert(orm);
    return true;
  }
  return await orm.transaction(async (tx) => {
    await insert(tx);
    return await clearClaim(tx, claim.conversationId, claim.requestId);
  });
}

async function clearClaim(orm: Orm, conversationId: string, requestId: string): Promise<boolean> {
  const rows = await orm
    .update(conversations)
    .set({ activeRequestId: null, leaseExpiresAt: null })
    .where(
      and(eq(conversations.id, conversationId), eq(conversations.activeRequestId, requestId)),
    )
    .returning({ id: conversations.id });
  return rows.length > 0;
}

/** The turn an earlier try has stored, whose answer was lost on the way. Throws TurnConflict. */
async function findStoredTurn(orm: Orm, claim: Claim): Promise<StoredTurn> {
  const rows = await orm
    .select({ id: messages.id, role: messages.role, parentId: messages.parentId })
    .from(messages)
    .innerJoin(requests, eq(requests.id, messages.requestId))
    .where(eq(requests.id, claim.requestId))
    .orderBy(messages.id);
  if (rows.length === 0) {
    throw new TurnConflict("the conversation was deleted or continued elsewhere meanwhile");
  }
  // The answers are the assistant messages that share the last parent.
  const parentId = rows.at(-1)!.parentId;
  const outputIds = rows.filter((row) => row.parentId === parentId).map((row) => row.id);
  const inputIds = rows.filter((row) => row.parentId !== parentId).map((row) => row.id);
  return { inputIds, outputIds };
}

/** The last new message carries the tokens that the new messages added to the prompt. */
function countInputTokens(
  inputs: (typeof messages.$inferInsert)[],
  claim: Claim,
  promptTokens: number | null,
): void {
  const last = inputs.at(-1);
  const before = claim.parentId === null ? 0 : (claim.history.at(-1)?.contextTokenCount ?? null);
  if (last === undefined || promptTokens === null) return;
  last.contextTokenCount = promptTokens;
  // A truncated prompt is shorter than what came before it: then there is no such number.
  if (before !== null && promptTokens >= before) last.tokenCount = promptTokens - before;
}

function sumOrNull(a: number | null | undefined, b: number | null): number | null {
  return a === null || a === undefined || b === null ? null : a + b;
}

function leaseEnd(leaseMs: number) {
  return sql`now() + make_interval(secs => ${leaseMs / 1000})`;
}
