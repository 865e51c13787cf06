// The tables of Kvasir. Ids are UUIDv7 made by the edge, so they sort by time. Column names are what
// people type in psql; the views at the end are meant for them.

import { sql } from "drizzle-orm";
import type { AnyPgColumn } from "drizzle-orm/pg-core";
import {
  bigint,
  boolean,
  customType,
  date,
  doublePrecision,
  index,
  integer,
  jsonb,
  pgTable,
  pgView,
  primaryKey,
  text,
  timestamp,
  uuid,
} from "drizzle-orm/pg-core";

const bytea = customType<{ data: Uint8Array<ArrayBuffer>; driverData: Uint8Array }>({
  dataType: () => "bytea",
  fromDriver: (value) => new Uint8Array(value),
});

const createdAt = () => timestamp("created_at", { withTimezone: true }).notNull().defaultNow();

/** Who owns conversations. The salt is the root of the account's block ids: never shown to anyone. */
export const accounts = pgTable("accounts", {
  id: uuid("id").primaryKey(),
  name: text("name").notNull().unique(),
  /** 32 random bytes, made once. */
  salt: bytea("salt").notNull(),
  createdAt: createdAt(),
});

/** A tree of messages with one head: the leaf of the branch that the next turn continues. */
export const conversations = pgTable(
  "conversations",
  {
    id: uuid("id").primaryKey(),
    accountId: uuid("account_id")
      .notNull()
      .references(() => accounts.id),
    headMessageId: uuid("head_message_id"),
    metadata: jsonb("metadata").$type<Record<string, string>>().notNull().default({}),
    /** Sidecar that served the last turn, and so holds the cache; null before the first. */
    sidecar: text("sidecar"),
    /** The request that may append the next turn, while its lease lasts; null when there is none. */
    activeRequestId: uuid("active_request_id"),
    leaseExpiresAt: timestamp("lease_expires_at", { withTimezone: true }),
    createdAt: createdAt(),
    updatedAt: timestamp("updated_at", { withTimezone: true }).notNull().defaultNow(),
    /** Set by a delete, which also removes the messages. */
    deletedAt: timestamp("deleted_at", { withTimezone: true }),
  },
  (table) => [index("conversations_account_id_id_idx").on(table.accountId, table.id)],
);

/** One message. The parent is the message it answers or follows; null for the first. */
export const messages = pgTable(
  "messages",
  {
    id: uuid("id").primaryKey(),
    conversationId: uuid("conversation_id")
      .notNull()
      .references(() => conversations.id),
    parentId: uuid("parent_id").references((): AnyPgColumn => messages.id),
    role: text("role").notNull(),
    name: text("name"),
    content: text("content").notNull(),
    /**
     * Tokens this message adds to the prompt, its share of the template included. Where one turn
     * brought several messages the last of them carries their sum, the others null.
     */
    tokenCount: integer("token_count"),
    /** Tokens from the start of the branch to the end of this message; null before it was computed. */
    contextTokenCount: integer("context_token_count"),
    /** The request that brought or wrote it; null for the messages a conversation began with. */
    requestId: uuid("request_id"),
    createdAt: createdAt(),
  },
  (table) => [
    index("messages_conversation_id_idx").on(table.conversationId),
    index("messages_parent_id_idx").on(table.parentId),
  ],
);

/** One row per generation that was started, also when it failed or its client left. */
export const requests = pgTable(
  "requests",
  {
    id: uuid("id").primaryKey(),
    accountId: uuid("account_id")
      .notNull()
      .references(() => accounts.id),
    conversationId: uuid("conversation_id").references(() => conversations.id),
    model: text("model").notNull(),
    /** Null when no sidecar took the request. */
    sidecar: text("sidecar"),
    isStream: boolean("is_stream").notNull(),
    choiceCount: integer("choice_count").notNull(),
    /** Token counts and times are null where the request ended without a report of the sidecar. */
    promptTokens: integer("prompt_tokens"),
    completionTokens: integer("completion_tokens"),
    cachedGpuTokens: integer("cached_gpu_tokens"),
    cachedHostTokens: integer("cached_host_tokens"),
    cachedDiskTokens: integer("cached_disk_tokens"),
    queueMs: doublePrecision("queue_ms"),
    loadMs: doublePrecision("load_ms"),
    prefillMs: doublePrecision("prefill_ms"),
    ttftMs: doublePrecision("ttft_ms"),
    totalMs: doublePrecision("total_ms"),
    /** stop, length, or abort; of the first choice. */
    finishReason: text("finish_reason"),
    /** Code of the error that the client was told, or null. */
    error: text("error"),
    /** Prompt tokens that were not served from cache, by reason. */
    missReasons: jsonb("miss_reasons").$type<Record<string, number>>().notNull().default({}),
    createdAt: createdAt(),
  },
  (table) => [
    index("requests_conversation_id_idx").on(table.conversationId),
    index("requests_created_at_idx").on(table.createdAt),
  ],
);

/** Every sidecar that was ever asked to serve a conversation, and so may hold some of its blocks. */
export const conversationSidecars = pgTable(
  "conversation_sidecars",
  {
    conversationId: uuid("conversation_id")
      .notNull()
      .references(() => conversations.id),
    sidecar: text("sidecar").notNull(),
    createdAt: createdAt(),
  },
  (table) => [primaryKey({ columns: [table.conversationId, table.sidecar] })],
);

/** A conversation that a sidecar must still forget; the row goes when the sidecar has acknowledged. */
export const pendingDeletes = pgTable(
  "pending_deletes",
  {
    sidecar: text("sidecar").notNull(),
    conversationId: uuid("conversation_id")
      .notNull()
      .references(() => conversations.id),
    createdAt: createdAt(),
  },
  (table) => [primaryKey({ columns: [table.sidecar, table.conversationId] })],
);

/** Per conversation: its turns, tokens, and the share of prompt tokens that came from cache. */
export const sessionStats = pgView("session_stats", {
  conversationId: uuid("conversation_id").notNull(),
  turns: bigint("turns", { mode: "number" }).notNull(),
  promptTokens: bigint("prompt_tokens", { mode: "number" }),
  completionTokens: bigint("completion_tokens", { mode: "number" }),
  cachedTokens: bigint("cached_tokens", { mode: "number" }),
  cachedShare: doublePrecision("cached_share"),
  ttftMsMedian: doublePrecision("ttft_ms_median"),
  lastRequestAt: timestamp("last_request_at", { withTimezone: true }),
}).as(sql`
  SELECT
    conversation_id,
    count(*) FILTER (WHERE finish_reason IN ('stop', 'length')) AS turns,
    sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens,
    sum(cached_gpu_tokens + cached_host_tokens + cached_disk_tokens) AS cached_tokens,
    sum(cached_gpu_tokens + cached_host_tokens + cached_disk_tokens)::float8
      / nullif(sum(prompt_tokens), 0) AS cached_share,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY ttft_ms) AS ttft_ms_median,
    max(created_at) AS last_request_at
  FROM requests
  WHERE conversation_id IS NOT NULL
  GROUP BY conversation_id`);

/** Per day and model: requests, prompt tokens, and what share of them each tier served. */
export const cacheHitsByDay = pgView("cache_hits_by_day", {
  day: date("day").notNull(),
  model: text("model").notNull(),
  requests: bigint("requests", { mode: "number" }).notNull(),
  promptTokens: bigint("prompt_tokens", { mode: "number" }),
  gpuShare: doublePrecision("gpu_share"),
  hostShare: doublePrecision("host_share"),
  diskShare: doublePrecision("disk_share"),
  ttftMsMedian: doublePrecision("ttft_ms_median"),
}).as(sql`
  SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    model,
    count(*) AS requests,
    sum(prompt_tokens) AS prompt_tokens,
    sum(cached_gpu_tokens)::float8 / nullif(sum(prompt_tokens), 0) AS gpu_share,
    sum(cached_host_tokens)::float8 / nullif(sum(prompt_tokens), 0) AS host_share,
    sum(cached_disk_tokens)::float8 / nullif(sum(prompt_tokens), 0) AS disk_share,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY ttft_ms) AS ttft_ms_median
  FROM requests
  GROUP BY 1, 2`);

/** Per day, model and reason: prompt tokens that no tier served. */
export const cacheMissesByDay = pgView("cache_misses_by_day", {
  day: date("day").notNull(),
  model: text("model").notNull(),
  reason: text("reason").notNull(),
  tokens: bigint("tokens", { mode: "number" }).notNull(),
  requests: bigint("requests", { mode: "number" }).notNull(),
}).as(sql`
  SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    model,
    miss.key AS reason,
    sum(miss.value::bigint) AS tokens,
    count(*) AS requests
  FROM requests, jsonb_each_text(miss_reasons) AS miss
  GROUP BY 1, 2, 3`);
