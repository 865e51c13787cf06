CREATE TABLE "accounts" (
	"id" uuid PRIMARY KEY NOT NULL,
	"name" text NOT NULL,
	"salt" "bytea" NOT NULL,
	"created_at" timestamp with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "accounts_name_unique" UNIQUE("name")
);
--> statement-breakpoint
CREATE TABLE "conversation_sidecars" (
	"conversation_id" uuid NOT NULL,
	"sidecar" text NOT NULL,
	"created_at" timestamp with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "conversation_sidecars_conversation_id_sidecar_pk" PRIMARY KEY("conversation_id","sidecar")
);
--> statement-breakpoint
CREATE TABLE "conversations" (
	"id" uuid PRIMARY KEY NOT NULL,
	"account_id" uuid NOT NULL,
	"head_message_id" uuid,
	"metadata" jsonb DEFAULT '{}'::jsonb NOT NULL,
	"sidecar" text,
	"active_request_id" uuid,
	"lease_expires_at" timestamp with time zone,
	"created_at" timestamp with time zone DEFAULT now() NOT NULL,
	"updated_at" timestamp with time zone DEFAULT now() NOT NULL,
	"deleted_at" timestamp with time zone
);
--> statement-breakpoint
CREATE TABLE "messages" (
	"id" uuid PRIMARY KEY NOT NULL,
	"conversation_id" uuid NOT NULL,
	"parent_id" uuid,
	"role" text NOT NULL,
	"name" text,
	"content" text NOT NULL,
	"token_count" integer,
	"context_token_count" integer,
	"request_id" uuid,
	"created_at" timestamp with time zone DEFAULT now() NOT NULL
);
--> statement-breakpoint
CREATE TABLE "pending_deletes" (
	"sidecar" text NOT NULL,
	"conversation_id" uuid NOT NULL,
	"created_at" timestamp with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "pending_deletes_sidecar_conversation_id_pk" PRIMARY KEY("sidecar","conversation_id")
);
--> statement-breakpoint
CREATE TABLE "requests" (
	"id" uuid PRIMARY KEY NOT NULL,
	"account_id" uuid NOT NULL,
	"conversation_id" uuid,
	"model" text NOT NULL,
	"sidecar" text,
	"is_stream" boolean NOT NULL,
	"choice_count" integer NOT NULL,
	"prompt_tokens" integer,
	"completion_tokens" integer,
	"cached_gpu_tokens" integer,
	"cached_host_tokens" integer,
	"cached_disk_tokens" integer,
	"queue_ms" double precision,
	"load_ms" double precision,
	"prefill_ms" double precision,
	"ttft_ms" double precision,
	"total_ms" double precision,
	"finish_reason" text,
	"error" text,
	"miss_reasons" jsonb DEFAULT '{}'::jsonb NOT NULL,
	"created_at" timestamp with time zone DEFAULT now() NOT NULL
);
--> statement-breakpoint
ALTER TABLE "conversation_sidecars" ADD CONSTRAINT "conversation_sidecars_conversation_id_conversations_id_fk" FOREIGN KEY ("conversation_id") REFERENCES "public"."conversations"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "conversations" ADD CONSTRAINT "conversations_account_id_accounts_id_fk" FOREIGN KEY ("account_id") REFERENCES "public"."accounts"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "messages" ADD CONSTRAINT "messages_conversation_id_conversations_id_fk" FOREIGN KEY ("conversation_id") REFERENCES "public"."conversations"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "messages" ADD CONSTRAINT "messages_parent_id_messages_id_fk" FOREIGN KEY ("parent_id") REFERENCES "public"."messages"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "pending_deletes" ADD CONSTRAINT "pending_deletes_conversation_id_conversations_id_fk" FOREIGN KEY ("conversation_id") REFERENCES "public"."conversations"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "requests" ADD CONSTRAINT "requests_account_id_accounts_id_fk" FOREIGN KEY ("account_id") REFERENCES "public"."accounts"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "requests" ADD CONSTRAINT "requests_conversation_id_conversations_id_fk" FOREIGN KEY ("conversation_id") REFERENCES "public"."conversations"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
CREATE INDEX "conversations_account_id_id_idx" ON "conversations" USING btree ("account_id","id");--> statement-breakpoint
CREATE INDEX "messages_conversation_id_idx" ON "messages" USING btree ("conversation_id");--> statement-breakpoint
CREATE INDEX "messages_parent_id_idx" ON "messages" USING btree ("parent_id");--> statement-breakpoint
CREATE INDEX "requests_conversation_id_idx" ON "requests" USING btree ("conversation_id");--> statement-breakpoint
CREATE INDEX "requests_created_at_idx" ON "requests" USING btree ("created_at");--> statement-breakpoint
CREATE VIEW "public"."cache_hits_by_day" AS (
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
  GROUP BY 1, 2);--> statement-breakpoint
CREATE VIEW "public"."session_stats" AS (
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
  GROUP BY conversation_id);