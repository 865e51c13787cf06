// The tables of Kvasir. Ids are UUIDv7 made by the edge, so they sort by time. Column names are what
// people type in psql; the views in views.ts are meant for them.

import type { AnyPgColumn } from "drizzle-orm/pg-core";
import {
  bigint,
  boolean,
  customType,
  doublePrecision,
  index,
  integer,
  jsonb,
  pgTable,
  primaryKey,
  text,
  timestamp,
  uuid,
} from "drizzle-orm/pg-core";

export * from "./views.ts";

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
    /** What was done about the cached part of the prompt: none, resident, load, split or recompute. */
    cacheChoice: text("cache_choice"),
    /** Expected when that was chosen; null where there was nothing to load. The actual time is load_ms. */
    predictedLoadMs: doublePrecision("predicted_load_ms"),
    predictedRecomputeMs: doublePrecision("predicted_recompute_ms"),
    loadedBytes: bigint("loaded_bytes", { mode: "number" }),
    /** Tokens that had left the view by the end, because the context window was full. */
    droppedTokens: integer("dropped_tokens"),
    /** Such a view was lost and computed afresh from what it still shows. */
    viewRestarted: boolean("view_restarted"),
    /** The client's wishes for the cache of this conversation; null: none. */
    cacheTtlS: integer("cache_ttl_s"),
    cachePriority: integer("cache_priority"),
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

/** What each sidecar says about itself, once a minute, for as long as sidecar-stats.ts says. */
export const sidecarStats = pgTable(
  "sidecar_stats",
  {
    sidecar: text("sidecar").notNull(),
    /** To the minute: several edges keep one sample between them. */
    takenAt: timestamp("taken_at", { withTimezone: true }).notNull(),
    stats: jsonb("stats").$type<Record<string, unknown>>().notNull(),
  },
  (table) => [
    primaryKey({ columns: [table.sidecar, table.takenAt] }),
    index("sidecar_stats_taken_at_idx").on(table.takenAt),
  ],
);
