// Conversations from the client's side: stored turns, branches, deletes, two turns at once, and a
// database that goes away and comes back.

import { afterAll, afterEach, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { sql } from "drizzle-orm";
import postgres from "postgres";
import * as schemas from "../../edge/api-schemas.ts";
import { FrameType } from "../../sidecar/protocol.ts";
import { FakeSidecar, echo } from "../support/fake-sidecar.ts";
import { errorOf, parseEvents, readEvents, startEdge, type TestEdge, user } from "../support/edge.ts";
import { violations } from "../support/openai-schemas.ts";
import type { TestPostgres } from "../support/postgres.ts";
import { startPostgres } from "../support/postgres.ts";

setDefaultTimeout(60_000);

let pg: TestPostgres;
let sidecar: FakeSidecar;
let edge: TestEdge;

beforeAll(async () => {
  pg = await startPostgres();
  sidecar = new FakeSidecar();
  edge = await startEdge(pg.url, [sidecar], ["--commit-timeout-ms", "300"]);
});

afterEach(() => {
  sidecar.script = echo;
});

afterAll(async () => {
  await edge?.close();
  await sidecar?.stop();
  await pg?.remove();
});

type Conversation = {
  id: string;
  head_message_id: string | null;
  messages: { id: string; role: string; content: string; parent_id: string | null }[];
};

async function newConversation(body: object = {}, on = edge): Promise<string> {
  const response = await on.post("/v1/conversations", body);
  expect(response.status).toBe(200);
  return ((await response.json()) as Conversation).id;
}

async function read(id: string, on = edge): Promise<Conversation> {
  return (await (await on.request(`/v1/conversations/${id}`)).json()) as Conversation;
}

const contents = ({ messages }: Conversation) => messages.map((message) => message.content);

/** A sidecar's answer that waits for the test. */
function heldAnswer() {
  const running = Promise.withResolvers<void>();
  const released = Promise.withResolvers<void>();
  sidecar.script = async (stream) => {
    stream.delta("half");
    running.resolve();
    await released.promise;
    stream.done();
  };
  return { running: running.promise, release: released.resolve };
}

describe("a conversation", () => {
  test("begins with items or messages, in OpenAI's shape, and shows them", async () => {
    const response = await edge.post("/v1/conversations", {
      items: [
        { type: "message", role: "system", content: "be brief" },
        { type: "message", role: "user", content: [{ type: "input_text", text: "hi" }] },
      ],
      metadata: { topic: "x" },
    });
    const made = await response.json();
    expect(violations("ConversationResource", made)).toEqual([]);
    schemas.conversation.parse(made);
    const found = await read((made as Conversation).id);
    schemas.conversationWithMessages.parse(found);
    expect(found).toMatchObject({ metadata: { topic: "x" } });
    expect(contents(found)).toEqual(["be brief", "hi"]);
    expect(found.messages[1]!.parent_id).toBe(found.messages[0]!.id);
  });

  test("gets each turn appended, sends its history to the sidecar, and names the new ids", async () => {
    const id = await newConversation({ messages: [{ role: "system", content: "be brief" }] });
    const first = (await (await edge.chat({ conversation: id })).json()) as any;
    schemas.chatCompletion.parse(first);
    expect(first.conversation).toEqual({ id });
    const chunks = parseEvents(
      await (await edge.chat({ ...user("and now?"), conversation: id, stream: true })).text(),
    );
    expect(chunks.at(-1)).toBe("[DONE]");
    const last = JSON.parse(chunks.at(-2)!) as any;
    const found = await read(id);
    const turns = ["hello big world", "hello big world", "and now?", "and now?"];
    expect(contents(found)).toEqual(["be brief", ...turns]);
    expect(found.head_message_id).toBe(last.message_ids.output[0]);
    expect(found.messages.slice(1, 3).map((message) => message.id)).toEqual([
      ...first.message_ids.input,
      ...first.message_ids.output,
    ]);
    const submitted = sidecar.submits.at(-1)!;
    expect(submitted.conversation).toBe(id);
    expect(submitted.messages.map((message) => message.content)).toEqual([
      "be brief",
      ...turns.slice(0, 3),
    ]);
  });

  test("is continued rightly by a client that sends the whole history again", async () => {
    const id = await newConversation();
    await edge.chat({ conversation: id });
    const whole = (await read(id)).messages.map(({ role, content }) => ({ role, content }));
    await edge.chat({ messages: [...whole, { role: "user", content: "more" }], conversation: id });
    expect(contents(await read(id))).toEqual(["hello big world", "hello big world", "more", "more"]);
    const messages = (await read(id)).messages.map(({ role, content }) => ({ role, content }));
    const nothingNew = await errorOf(await edge.chat({ messages, conversation: id }));
    expect(nothingNew).toMatchObject({ status: 400, param: "messages" });
  });

  test("branches from an earlier message, and keeps all choices of a turn", async () => {
    const id = await newConversation();
    const first = (await (await edge.chat({ conversation: id })).json()) as any;
    await edge.chat({ ...user("left"), conversation: id });
    const parent_message_id = first.message_ids.output[0] as string;
    const right = (await (
      await edge.chat({ ...user("right"), n: 2, conversation: id, kvasir: { parent_message_id } })
    ).json()) as any;
    expect(contents(await read(id))).toEqual(["hello big world", "hello big world", "right", "right"]);
    expect(right.message_ids.output).toHaveLength(2);
    const missing = await edge.chat({
      conversation: id,
      kvasir: { parent_message_id: "01a20e24-56e0-7348-85b2-ece14305869f" },
    });
    expect(await errorOf(missing)).toMatchObject({ status: 404, code: "message_not_found" });
  });

  test("stores characters that the database has no place for as U+FFFD", async () => {
    sidecar.script = (stream) => {
      stream.delta("a\0b");
      stream.done();
    };
    const id = await newConversation();
    expect((await edge.chat({ conversation: id })).status).toBe(200);
    expect(contents(await read(id)).at(-1)).toBe("a\ufffdb");
  });

  test("is listed page by page", async () => {
    const ids = [await newConversation(), await newConversation(), await newConversation()];
    const page = async (query: string) =>
      (await (await edge.request(`/v1/conversations?${query}`)).json()) as any;
    const first = await page("limit=2");
    schemas.conversationList.parse(first);
    expect(first).toMatchObject({ has_more: true, last_id: ids[1] });
    const next = await page(`limit=2&after=${first.last_id}`);
    expect(next.data[0].id).toBe(ids[0]);
    expect((await edge.request("/v1/conversations?limit=0")).status).toBe(400);
    expect((await edge.request("/v1/conversations?after=x")).status).toBe(400);
  });

  test("has its metadata replaced, as OpenAI's clients do it or by PATCH", async () => {
    const id = await newConversation({ metadata: { topic: "x", title: "old" } });
    const made = await (await edge.post(`/v1/conversations/${id}`, { metadata: { title: "new" } })).json();
    expect(violations("ConversationResource", made)).toEqual([]);
    expect(made).toMatchObject({ id, metadata: { title: "new" } });
    await edge.post(`/v1/conversations/${id}`, { metadata: { title: "newer" } }, { method: "PATCH" });
    expect(await read(id)).toMatchObject({ metadata: { title: "newer" } });
    expect((await edge.post(`/v1/conversations/${id}`, {})).status).toBe(400);
    const unknown = await edge.post("/v1/conversations/01a20e24-56e0-7348-85b2-ece14305869f", { metadata: {} });
    expect(await errorOf(unknown)).toMatchObject({ status: 404, code: "conversation_not_found" });
  });

  test("refuses what tools say, and calls of tools", async () => {
    const cases: [object, string][] = [
      [{ role: "tool", content: "21 degrees" }, "items.0.role: tools are not supported"],
      [{ role: "wizard", content: "x" }, "items.0.role: must be one of system, developer, user, assistant"],
      [
        { role: "assistant", content: null, tool_calls: [{ id: "c1", type: "function" }] },
        "items.0.tool_calls: tool calls are not supported",
      ],
    ];
    for (const [item, message] of cases) {
      const refused = await errorOf(await edge.post("/v1/conversations", { items: [item] }));
      expect(refused).toMatchObject({ status: 400, type: "invalid_request_error", message });
    }
  });

  test("refuses wrong bodies and ids", async () => {
    const metadata = Object.fromEntries(Array.from({ length: 17 }, (_, i) => [`k${i}`, "v"]));
    for (const body of [{ metadata }, { metadata: { a: 1 } }, { items: [{ role: "x" }] }, []]) {
      expect((await edge.post("/v1/conversations", body)).status).toBe(400);
    }
    expect((await edge.request("/v1/conversations/nope")).status).toBe(404);
  });
});

describe("a client that leaves mid-answer", () => {
  test("leaves no turn, but a request row, and the conversation free", async () => {
    const id = await newConversation();
    const { running } = heldAnswer();
    const response = await edge.chat({ conversation: id, stream: true });
    await running;
    await response.body!.cancel();
    await edge.services.drain.whenIdle();
    expect((await read(id)).messages).toEqual([]);
    const rows = await edge.services.database.run((orm) =>
      orm.execute(sql`select finish_reason from requests where conversation_id = ${id}`),
    );
    expect([...rows]).toEqual([{ finish_reason: "abort" }]);
    sidecar.script = echo;
    expect((await edge.chat({ conversation: id })).status).toBe(200);
  });
});

describe("two turns at once on one conversation", () => {
  test("through two edges: the second gets 409 before it costs anything", async () => {
    const other = await startEdge(pg.url, [sidecar]);
    const id = await newConversation();
    const { running, release } = heldAnswer();
    const first = edge.chat({ conversation: id });
    await running;
    const submits = sidecar.submits.length;
    expect(await errorOf(await other.chat({ conversation: id }))).toMatchObject({
      status: 409,
      code: "conversation_busy",
    });
    expect(sidecar.submits).toHaveLength(submits);
    release();
    expect((await first).status).toBe(200);
    sidecar.script = echo;
    expect((await other.chat({ conversation: id })).status).toBe(200);
    await other.close();
  });
});

describe("a long answer", () => {
  test("keeps its conversation by renewing the lease", async () => {
    const own = await startEdge(pg.url, [sidecar], ["--lease-ms", "1000"]);
    const id = await newConversation({}, own);
    const { running, release } = heldAnswer();
    const answer = own.chat({ conversation: id });
    await running;
    const lease = async () => {
      const rows = await edge.services.database.run((orm) =>
        orm.execute<{ lease: string }>(
          sql`select lease_expires_at as lease from conversations where id = ${id}`,
        ),
      );
      return rows[0]!.lease;
    };
    const first = await lease();
    while ((await lease()) === first);
    expect((await edge.chat({ conversation: id })).status).toBe(409);
    release();
    expect((await answer).status).toBe(200);
    await own.close();
  });
});

describe("a delete", () => {
  test("removes the messages and has the sidecar forget", async () => {
    const id = await newConversation();
    await edge.chat({ conversation: id });
    const response = await edge.request(`/v1/conversations/${id}`, { method: "DELETE" });
    const deleted = await response.json();
    schemas.conversationDeleted.parse(deleted);
    expect(deleted).toEqual({
      id,
      object: "conversation.deleted",
      deleted: true,
      kvasir: { blocks: { gpu: 1 }, pending_sidecars: [] },
    });
    expect(sidecar.forgotten).toContain(id);
    expect((await edge.request(`/v1/conversations/${id}`)).status).toBe(404);
    expect((await edge.chat({ conversation: id })).status).toBe(404);
    expect((await edge.request(`/v1/conversations/${id}`, { method: "DELETE" })).status).toBe(404);
  });

  test("reaches a sidecar that was away, before any submit", async () => {
    const late = new FakeSidecar({ name: "late" });
    const first = await startEdge(pg.url, [late]);
    const id = await newConversation({}, first);
    await first.chat({ conversation: id });
    await first.close();
    await late.stop();
    const deleted = await edge.request(`/v1/conversations/${id}`, { method: "DELETE" });
    expect(await deleted.json()).toMatchObject({
      deleted: true,
      kvasir: { blocks: {}, pending_sidecars: ["late"] },
    });
    late.start();
    late.frames.length = 0;
    const second = await startEdge(pg.url, [late]);
    await second.chat({});
    const types = late.frames.map((frame) => frame[0]);
    expect(late.forgotten).toEqual([id]);
    expect(types.indexOf(FrameType.forget)).toBeLessThan(types.indexOf(FrameType.submit));
    const pending = () =>
      second.services.database.run((orm) =>
        orm.execute(sql`select 1 from pending_deletes where sidecar = 'late'`),
      );
    while ((await pending()).length > 0);
    await second.close();
    await late.stop();
  });

  test("while a turn runs: the turn is not stored, and the sidecar forgets once more", async () => {
    const id = await newConversation();
    const { running, release } = heldAnswer();
    const answer = edge.chat({ conversation: id });
    await running;
    await edge.request(`/v1/conversations/${id}`, { method: "DELETE" });
    expect(sidecar.forgotten.filter((other) => other === id)).toHaveLength(1);
    release();
    expect(await errorOf(await answer)).toMatchObject({ status: 409, code: "turn_not_stored" });
    await sidecar.until(() => sidecar.forgotten.filter((other) => other === id).length === 2);
  });
});

describe("a database that does not take the turn in time", () => {
  test("ends the answer with turn_not_stored, and does not store it later either", async () => {
    const id = await newConversation();
    const { running, release } = heldAnswer();
    const answer = edge.chat({ conversation: id });
    await running;
    const other = postgres(pg.url, { max: 1 });
    try {
      await other.begin(async (tx) => {
        await tx`lock table messages in access exclusive mode`;
        release();
        expect(await errorOf(await answer)).toMatchObject({ status: 503, code: "turn_not_stored" });
      });
    } finally {
      await other.end();
    }
    expect((await read(id)).messages).toEqual([]);
    sidecar.script = echo;
    expect((await edge.chat({ conversation: id })).status).toBe(200);
  });
});

describe("a database that goes away", () => {
  test("and is back in time costs the turn nothing", async () => {
    const own = await startEdge(pg.url, [sidecar], ["--commit-timeout-ms", "20000"]);
    const id = await newConversation({}, own);
    const { running, release } = heldAnswer();
    const answer = own.chat({ conversation: id });
    await running;
    await pg.stop();
    release();
    await own.services.database.check().catch(() => {}); // now it is known to be down
    await pg.start();
    expect((await answer).status).toBe(200);
    expect(contents(await read(id, own))).toEqual(["hello big world", "half"]);
    await own.close();
    await edge.services.database.check().catch(() => {}); // its idle connections broke as well
    await edge.services.database.whenUp(10_000);
  });

  test("ends a turn with turn_not_stored; chats without conversation are served", async () => {
    const id = await newConversation();
    const { running, release } = heldAnswer();
    const stream = await edge.chat({ conversation: id, stream: true });
    await running;
    await pg.stop();
    release();
    const events = await readEvents(stream);
    expect(JSON.parse(events.at(-1)!)).toMatchObject({ error: { code: "turn_not_stored" } });

    sidecar.script = echo;
    const submits = sidecar.submits.length;
    expect(await errorOf(await edge.chat({ conversation: id }))).toMatchObject({
      status: 503,
      code: "database_unavailable",
    });
    expect(sidecar.submits).toHaveLength(submits);
    const { turns } = edge.services;
    const dropped = turns.droppedRowCount;
    expect((await edge.chat({})).status).toBe(200);
    expect(turns.droppedRowCount).toBe(dropped + 1);
    expect((await edge.request("/readyz")).status).toBe(503);

    await pg.start();
    await edge.services.database.whenUp(10_000);
    expect((await edge.request("/readyz")).status).toBe(200);
    expect((await read(id)).messages).toEqual([]);
    await turns.releaseClaims();
    expect((await edge.chat({ conversation: id })).status).toBe(200);
  });
});
