// A sidecar that restarts, one that is killed mid-answer, a database that goes away: with the bundled model, through
// edges on Bun and on Deno. Clients get a clear error, nothing that was answered is lost, and all goes on afterwards.

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI, { APIError } from "openai";
import { type EdgeProcess, RUNTIMES, startEdgeProcess } from "../support/edge-process.ts";
import { startPostgres, type TestPostgres } from "../support/postgres.ts";
import { MODEL, type SidecarProcess, startSidecarProcess } from "../support/sidecar-process.ts";

setDefaultTimeout(60_000);

let pg: TestPostgres;

beforeAll(async () => {
  pg = await startPostgres();
});

afterAll(async () => {
  await pg?.remove();
});

const user = (content: string) => [{ role: "user" as const, content }];

async function errorOf(work: PromiseLike<unknown>): Promise<APIError> {
  try {
    await work;
  } catch (error) {
    expect(error).toBeInstanceOf(APIError);
    return error as APIError;
  }
  throw new Error("it did not fail");
}

describe.each([...RUNTIMES])("outages behind the edge on %s", (runtime) => {
  const data = mkdtempSync(join(tmpdir(), "kvasir-test-outage-"));
  let sidecar: SidecarProcess;
  let edge: EdgeProcess;
  let client: OpenAI;

  beforeAll(async () => {
    sidecar = await startSidecarProcess({ data });
    edge = await startEdgeProcess(runtime, pg.url, [sidecar]);
    client = new OpenAI({ baseURL: `${edge.url}/v1`, apiKey: "none", maxRetries: 0 });
  });

  afterAll(async () => {
    await edge?.stop();
    await sidecar?.stop();
    rmSync(data, { recursive: true });
  });

  async function restart(): Promise<void> {
    sidecar = await startSidecarProcess({ data, port: Number(new URL(sidecar.url).port) });
    while ((await fetch(`${edge.url}/readyz`)).status !== 200);
  }

  async function turn(conversation: string, content: string, fields: object = {}, by = client) {
    const body = { model: MODEL, messages: user(content), temperature: 0, max_tokens: 60, conversation, ...fields };
    const answer = await by.chat.completions.create(body as OpenAI.ChatCompletionCreateParamsNonStreaming);
    const { kvasir } = answer as unknown as { kvasir: { cached_tokens: Record<"gpu" | "host" | "disk", number> } };
    return { text: answer.choices[0]!.message.content!, usage: answer.usage!, cached: kvasir.cached_tokens };
  }

  async function contentsOf(conversation: string): Promise<string[]> {
    const found = (await client.conversations.retrieve(conversation)) as unknown as { messages: { content: string }[] };
    return found.messages.map(({ content }) => content);
  }

  const LONG = `${runtime} likes long stories about the sea and the ships on it. `.repeat(12);

  test("the first turn after a restart comes from host memory or disk, and says the same", async () => {
    const { id } = await client.conversations.create({});
    const first = await turn(id, LONG);
    const whole = [...user(LONG), { role: "assistant" as const, content: first.text }, ...user("And then?")];
    const expected = await client.chat.completions.create({
      model: MODEL, messages: whole, temperature: 0, max_tokens: 60,
    });
    expect(await sidecar.stop()).toBe(0);
    await restart();
    const next = await turn(id, "And then?");
    expect(next.text).toBe(expected.choices[0]!.message.content!);
    expect(next.cached.gpu).toBe(0);
    expect(next.cached.host + next.cached.disk).toBeGreaterThanOrEqual(128);
  });

  test("what was deleted while the sidecar was away is gone when it is back", async () => {
    const { id } = await client.conversations.create({});
    const secret = `${crypto.randomUUID()} is the secret of ${runtime}. `.repeat(8);
    await turn(id, secret);
    await sidecar.stop();
    const deleted: unknown = await client.conversations.delete(id);
    expect(deleted).toMatchObject({ deleted: true, kvasir: { blocks: {}, pending_sidecars: ["sidecar-1"] } });
    await restart();
    const again = await client.chat.completions.create({ model: MODEL, messages: user(secret), max_tokens: 5 });
    // The beginning of every prompt is not this conversation's.
    expect(again.usage!.prompt_tokens_details!.cached_tokens).toBeLessThan(64);
    expect(again.usage!.prompt_tokens).toBeGreaterThan(128);
  });

  test("a sidecar that is killed mid-answer ends the stream with an error, and the turn is not stored", async () => {
    const { id } = await client.conversations.create({});
    await turn(id, LONG);
    const body = { model: MODEL, messages: user("Go on."), conversation: id, ignore_eos: true, max_tokens: 2000 };
    const stream = await client.chat.completions.create({ ...body, stream: true } as never);
    let chunks = 0;
    const read = async () => {
      for await (const _ of stream as unknown as AsyncIterable<unknown>) if (++chunks === 5) await sidecar.kill();
    };
    expect((await errorOf(read())).code).toBe("sidecar_lost");
    await restart();
    expect((await contentsOf(id)).length).toBe(2);
    await turn(id, "Go on.");
    expect((await contentsOf(id)).length).toBe(4);
  });

  test("a request that comes while the sidecar is away waits for it, or is told when to come again", async () => {
    await sidecar.kill();
    const { id } = await client.conversations.create({});
    const patient = client.withOptions({ maxRetries: 20 }); // it waits as Retry-After says
    const [{ text }] = await Promise.all([turn(id, "Hello?", {}, patient), restart()]);
    expect(await contentsOf(id)).toEqual(["Hello?", text]);
  });

  test("while the database is away, conversations get 503 and plain chats their answers", async () => {
    const { id } = await client.conversations.create({});
    await turn(id, "Before.");
    await pg.stop();
    const refused = await errorOf(turn(id, "Meanwhile."));
    expect(refused).toMatchObject({ status: 503, code: "database_unavailable" });
    expect(refused.headers!.get("retry-after")).toBe("1");
    const plain = await client.chat.completions.create({ model: MODEL, messages: user("hi"), max_tokens: 5 });
    expect(plain.choices).toHaveLength(1);
    expect((await fetch(`${edge.url}/readyz`)).status).toBe(503);
    expect((await fetch(`${edge.url}/healthz`)).status).toBe(200);
    await pg.start();
    while ((await fetch(`${edge.url}/readyz`)).status !== 200);
    await turn(id, "Afterwards.");
    expect((await contentsOf(id)).filter((_, i) => i % 2 === 0)).toEqual(["Before.", "Afterwards."]);
  });
});
