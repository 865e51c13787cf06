// Migrations, queries, turns and the pool's view of the database's health, against a real PostgreSQL.

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { sql } from "drizzle-orm";
import { Database, DatabaseUnavailable, errorCode } from "../../db/client.ts";
import { DatabaseRefused, migrate, SchemaTooNew } from "../../db/migrate.ts";
import * as queries from "../../db/queries.ts";
import * as turns from "../../db/turns.ts";
import { uuidv7 } from "../../db/uuid.ts";
import type { TestPostgres } from "../support/postgres.ts";
import { startPostgres } from "../support/postgres.ts";

setDefaultTimeout(60_000);

let pg: TestPostgres;
let db: Database;
let account: queries.Account;

const LEASE_MS = 60_000;

function openDatabase(onChange?: (isUp: boolean) => void): Database {
  return new Database({
    url: pg.url,
    poolSize: 4,
    connectTimeoutMs: 2000,
    queryTimeoutMs: 5000,
    statementTimeoutMs: 500,
    probeIntervalMs: 20,
    ...(onChange && { onChange }),
  });
}

/** A conversation with the claim of one request on it. */
async function claimed(initial: queries.NewMessage[] = []) {
  const conversation = await db.run((orm) =>
    queries.createConversation(orm, account.id, {}, initial),
  );
  return await claim(conversation.id);
}

async function claim(conversationId: string, options: { leaseMs?: number; parentId?: string } = {}) {
  const requestId = uuidv7();
  const result = await db.run((orm) =>
    turns.claimTurn(orm, {
      accountId: account.id,
      conversationId,
      requestId,
      leaseMs: LEASE_MS,
      ...options,
    }),
  );
  if (typeof result === "string") throw new Error(result);
  return result;
}

function requestRow(from: turns.Claim, promptTokens = 10): turns.RequestRow {
  return {
    id: from.requestId,
    accountId: account.id,
    conversationId: from.conversationId,
    model: "tiny",
    sidecar: "a",
    isStream: false,
    choiceCount: 1,
    promptTokens,
    completionTokens: 3,
    cachedGpuTokens: 4,
    cachedHostTokens: 1,
    cachedDiskTokens: 0,
    ttftMs: 5,
    finishReason: "stop",
    missReasons: { absent: 5 },
  };
}

function turn(from: turns.Claim, promptTokens = 10, content = "fine"): turns.Turn {
  return {
    claim: from,
    request: requestRow(from, promptTokens),
    newMessages: [{ role: "user", content: "how are you?" }],
    answers: [{ content, tokenCount: 3 }],
  };
}

beforeAll(async () => {
  pg = await startPostgres();
  await Promise.all(Array.from({ length: 6 }, () => migrate(pg.url)));
  db = openDatabase();
  account = (await db.run((orm) => queries.findAccount(orm, "default")))!;
});

afterAll(async () => {
  await db?.close();
  await pg?.remove();
});

describe("migrate", () => {
  test("run by six processes at once makes one default account with a salt of 32 bytes", async () => {
    const rows = await db.run((orm) => orm.execute(sql`select name from accounts`));
    expect([...rows]).toEqual([{ name: "default" }]);
    expect(account.salt).toHaveLength(32);
  });

  test("keeps the salt when it runs again", async () => {
    await migrate(pg.url);
    const again = await db.run((orm) => queries.findAccount(orm, "default"));
    expect(again).toEqual(account);
  });

  test("refuses a database of a newer schema", async () => {
    const future = sql`insert into drizzle.__drizzle_migrations (hash, created_at)
      values ('x', ${Date.now() + 1e12})`;
    await db.run((orm) => orm.execute(future));
    try {
      await expect(migrate(pg.url)).rejects.toThrow(SchemaTooNew);
    } finally {
      await db.run((orm) =>
        orm.execute(sql`delete from drizzle.__drizzle_migrations where hash = 'x'`),
      );
    }
  });

  test("says which database it cannot reach, without the password", async () => {
    const refused = migrate("postgres://kvasir:hush@127.0.0.1:1/postgres").catch((e: unknown) => e);
    const error = (await refused) as Error;
    expect(error).toBeInstanceOf(DatabaseUnavailable);
    expect(error.message).toContain("kvasir:***@127.0.0.1:1");
    expect(error.message).not.toContain("hush");
  });
});

describe("a database that does not let us in", () => {
  const cases: [change: (url: URL) => void, message: string][] = [
    [(url) => (url.pathname = "/nowhere"), 'database "nowhere" does not exist'],
    [(url) => (url.username = "nobody"), 'role "nobody" does not exist'],
  ];

  test.each(cases)("case %#: is told in one line, without the password", async (change, message) => {
    const url = new URL(pg.url);
    url.password = "hush";
    change(url);
    const error = (await migrate(url.href).catch((e: unknown) => e)) as Error;
    expect(error).toBeInstanceOf(DatabaseRefused);
    expect(error.message).toContain(message);
    expect(error.message).not.toContain("hush");
  });

  test("whose URL is none", async () => {
    await expect(migrate("postgres://host:port/db")).rejects.toThrow(DatabaseRefused);
  });
});

describe("conversations", () => {
  test("begin with their initial messages, in order, and are listed newest first", async () => {
    const initial = [
      { role: "system", content: "be brief" },
      { role: "user", content: "hi" },
    ];
    const made = await db.run((orm) =>
      queries.createConversation(orm, account.id, { topic: "x" }, initial),
    );
    const later = await db.run((orm) => queries.createConversation(orm, account.id, {}, []));
    const branch = await db.run((orm) => queries.loadBranch(orm, made.id, made.headMessageId!));
    expect(branch.map(({ role, content }) => ({ role, content }))).toEqual(initial);
    expect(branch[1]!.parentId).toBe(branch[0]!.id);
    const list = await db.run((orm) => queries.listConversations(orm, account.id, 2, null));
    expect(list.map((row) => row.id)).toEqual([later.id, made.id]);
    const next = await db.run((orm) => queries.listConversations(orm, account.id, 1, later.id));
    expect(next.map((row) => row.id)).toEqual([made.id]);
  });

  test("of another account are not found", async () => {
    const { conversationId } = await claimed();
    const other = uuidv7();
    expect(await db.run((orm) => queries.findConversation(orm, other, conversationId))).toBeNull();
    expect(await db.run((orm) => queries.deleteConversation(orm, other, conversationId))).toBeNull();
  });

  test("once deleted have no messages, and every sidecar that served them must forget", async () => {
    const first = await claimed([{ role: "user", content: "secret" }]);
    await db.run((orm) => turns.recordPlacement(orm, first, "a"));
    await db.run((orm) => turns.recordPlacement(orm, { ...first, sidecar: "a" }, "b"));
    const id = first.conversationId;
    const sidecars = await db.run((orm) => queries.deleteConversation(orm, account.id, id));
    expect(sidecars!.toSorted()).toEqual(["a", "b"]);
    expect(await db.run((orm) => queries.findConversation(orm, account.id, id))).toBeNull();
    const left = await db.run((orm) =>
      orm.execute(sql`select 1 from messages where conversation_id = ${id}`),
    );
    expect(left).toHaveLength(0);
    await db.run((orm) => queries.removePendingDelete(orm, "a", id));
    const pendingOf = (sidecar: string) =>
      db.run((orm) => queries.listPendingDeletes(orm, sidecar, 10));
    expect(await pendingOf("a")).toEqual([]);
    expect(await pendingOf("b")).toEqual([{ conversationId: id, salt: account.salt }]);
    // A turn that was still running is told, and its sidecars are asked once more.
    expect(await db.run((orm) => turns.endRequest(orm, requestRow(first), first))).toBe(false);
    const again = await db.run((orm) => queries.renewPendingDeletes(orm, id));
    expect(again.toSorted()).toEqual(["a", "b"]);
    expect(await pendingOf("a")).toHaveLength(1);
  });
});

describe("a turn", () => {
  test("is stored with its request, and the next one continues from it", async () => {
    const first = await claimed();
    const stored = await db.run((orm) => turns.commitTurn(orm, turn(first)));
    const second = await claim(first.conversationId);
    expect(second.history.map((message) => message.content)).toEqual(["how are you?", "fine"]);
    expect(second.history.map((message) => message.id)).toEqual([
      ...stored.inputIds,
      ...stored.outputIds,
    ]);
    expect(second.history.map((message) => message.tokenCount)).toEqual([10, 3]);
    await db.run((orm) => turns.commitTurn(orm, turn(second, 18)));
    const third = await claim(first.conversationId);
    const counts = third.history.map((message) => message.tokenCount);
    expect(counts).toEqual([10, 3, 5, 3]);
    expect(third.history.at(-1)!.contextTokenCount).toBe(21);
  });

  test("makes a second one wait for its end, or for the end of its lease", async () => {
    const first = await claimed();
    await expect(claim(first.conversationId)).rejects.toThrow("busy");
    await db.run((orm) => turns.endRequest(orm, requestRow(first), first));
    const lapsed = await claim(first.conversationId, { leaseMs: 0 });
    const next = await claim(first.conversationId, { leaseMs: 0 });
    await db.run((orm) => turns.renewLeases(orm, [next.requestId], LEASE_MS));
    await expect(claim(first.conversationId)).rejects.toThrow("busy");
    // The one whose lease had lapsed cannot store any more, and leaves nothing behind.
    await expect(db.run((orm) => turns.commitTurn(orm, turn(lapsed)))).rejects.toThrow(turns.TurnConflict);
    await db.run((orm) => turns.commitTurn(orm, turn(next)));
    const last = await claim(first.conversationId);
    expect(last.history).toHaveLength(2);
  });

  test("that is committed twice is stored once, under the same ids", async () => {
    const first = await claimed();
    const ids = await db.run((orm) => turns.commitTurn(orm, turn(first)));
    expect(await db.run((orm) => turns.commitTurn(orm, turn(first)))).toEqual(ids);
    expect((await claim(first.conversationId)).history).toHaveLength(2);
  });

  test("may branch from an earlier message; one that is not there is refused", async () => {
    const first = await claimed();
    const stored = await db.run((orm) => turns.commitTurn(orm, turn(first)));
    const second = await claim(first.conversationId);
    await db.run((orm) => turns.commitTurn(orm, turn(second, 20, "left")));
    const parentId = stored.outputIds[0]!;
    const fork = await claim(first.conversationId, { parentId });
    expect(fork.history).toHaveLength(2);
    await db.run((orm) => turns.commitTurn(orm, turn(fork, 20, "right")));
    const head = await claim(first.conversationId);
    expect(head.history.at(-1)!.content).toBe("right");
    await db.run((orm) => turns.endRequest(orm, requestRow(head), head));
    await expect(claim(first.conversationId, { parentId: uuidv7() })).rejects.toThrow("parent_not_found");
    await claim(first.conversationId);
  });

  test("shows in the views for psql", async () => {
    const first = await claimed();
    await db.run((orm) => turns.commitTurn(orm, turn(first, 100))); // most had left the view before
    const [session] = await db.run((orm) =>
      orm.execute<{ turns: string; cached_share: number }>(
        sql`select * from session_stats where conversation_id = ${first.conversationId}`,
      ),
    );
    expect(session).toMatchObject({
      turns: "1", prompt_tokens: "100", missed_tokens: "5", cached_share: 0.5, ttft_ms_median: 5,
    });
    const days = await db.run((orm) => orm.execute(sql`select * from cache_hits_by_day`));
    expect(days.length).toBeGreaterThan(0);
    const misses = await db.run((orm) => orm.execute(sql`select * from cache_misses_by_day`));
    expect(misses[0]).toMatchObject({ model: "tiny", reason: "absent" });
  });
});

describe("Database", () => {
  test("fails at once while the server is away, and works again when it is back", async () => {
    const { promise: isBack, resolve } = Promise.withResolvers<void>();
    const changes: boolean[] = [];
    const own = openDatabase((isUp) => {
      changes.push(isUp);
      if (isUp) resolve();
    });
    await own.check();
    await pg.stop();
    await expect(own.check()).rejects.toThrow(DatabaseUnavailable);
    await expect(own.check()).rejects.toThrow(DatabaseUnavailable);
    expect(own.isDown).toBe(true);
    await pg.start();
    await isBack;
    await own.check();
    expect(changes).toEqual([false, true]);
    await own.close();
    await db.check().catch(() => {}); // its pool met the stop as well
  });

  test("hands errors of the query itself through", async () => {
    const own = openDatabase();
    const wrong = own.run((orm) => orm.execute(sql`select * from nowhere`));
    await expect(wrong).rejects.toThrow();
    expect(await wrong.catch((error: unknown) => error)).not.toBeInstanceOf(DatabaseUnavailable);
    expect(own.isDown).toBe(false);
    await own.close();
  });

  test("has the server cancel a statement that takes too long", async () => {
    const slow = db.run((orm) => orm.execute(sql`select pg_sleep(5)`));
    expect(errorCode(await slow.catch((error: unknown) => error))).toBe("57014");
    expect(db.isDown).toBe(false);
  });

  test("calls one slow query late, but not the database down", async () => {
    const own = openDatabase();
    const slow = own.run((orm) => orm.execute(sql`select pg_sleep(2)`), 50);
    expect(await slow.catch((error: unknown) => error)).toBeInstanceOf(DatabaseUnavailable);
    expect(own.isDown).toBe(false);
    await own.check();
    await own.close();
  });
});
