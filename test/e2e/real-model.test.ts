// The whole path with the bundled model, as an OpenAI client sees it: one sidecar, one database, and an edge on Bun and
// one on Deno over both. What comes from the cache must be what is computed without it.

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI, { APIError } from "openai";
import { chatRequest, submitRequest } from "../../edge/chat-request.ts";
import { SidecarClient } from "../../edge/sidecar-client.ts";
import { type EdgeProcess, RUNTIMES, startEdgeProcess } from "../support/edge-process.ts";
import { FAKE_SECRET } from "../support/fake-sidecar.ts";
import { startPostgres, type TestPostgres } from "../support/postgres.ts";
import { MODEL, type SidecarProcess, startSidecarProcess } from "../support/sidecar-process.ts";

setDefaultTimeout(60_000);

type Messages = OpenAI.ChatCompletionMessageParam[];

const data = mkdtempSync(join(tmpdir(), "kvasir-test-real-"));
const quiet = { debug() {}, info() {}, warn() {}, error() {} };
let pg: TestPostgres;
let sidecar: SidecarProcess;
let direct: SidecarClient;

beforeAll(async () => {
  [pg, sidecar] = await Promise.all([startPostgres(), startSidecarProcess({ data })]);
  const ready = Promise.withResolvers<void>();
  direct = new SidecarClient({
    url: sidecar.url, secret: FAKE_SECRET, edgeName: "test", log: quiet, onChange: ready.resolve,
  });
  await ready.promise;
});

afterAll(async () => {
  direct?.close();
  await sidecar?.stop();
  await pg?.remove();
  rmSync(data, { recursive: true });
});

/** The answer to the messages for an account of their own, which can find nothing in the cache. */
async function withoutCache(messages: Messages, fields: object = {}): Promise<string> {
  const body = chatRequest.parse({ model: MODEL, messages, temperature: 0, max_tokens: 80, ...fields });
  const salt = crypto.getRandomValues(new Uint8Array(32));
  const stream = direct.submit(submitRequest(body, { salt, maxModelLen: 2048, deadlineMs: 60_000 }));
  let text = "";
  for (;;) {
    const event = await stream.next();
    if (event.type === "done") {
      expect(event.done.usage.cachedTokens).toEqual({ gpu: 0, host: 0, disk: 0 });
      return text;
    }
    for (const delta of event.deltas) text += delta.text;
  }
}

const user = (content: string): Messages => [{ role: "user", content }];

function connect(edge: EdgeProcess): OpenAI {
  return new OpenAI({ baseURL: `${edge.url}/v1`, apiKey: "none", maxRetries: 0 });
}

/** One greedy answer. */
async function ask(client: OpenAI, messages: Messages, fields: object = {}) {
  const body = { model: MODEL, messages, temperature: 0, max_tokens: 80, ...fields };
  const answer = await client.chat.completions.create(body as OpenAI.ChatCompletionCreateParamsNonStreaming);
  return {
    text: answer.choices[0]!.message.content!,
    promptTokens: answer.usage!.prompt_tokens,
    cachedTokens: answer.usage!.prompt_tokens_details!.cached_tokens!,
    totalTokens: answer.usage!.total_tokens,
    answer,
  };
}

async function codeOf(work: PromiseLike<unknown>): Promise<unknown> {
  try {
    await work;
    return "no error";
  } catch (error) {
    return error instanceof APIError ? `${error.status} ${error.code}` : error;
  }
}

const QUESTIONS = ["My dog is called Rex.", "What is my dog called?", "Tell me something about the sea.", "Thank you!"];

describe.each([...RUNTIMES])("the bundled model behind the edge on %s", (runtime) => {
  let edge: EdgeProcess;
  let client: OpenAI;

  beforeAll(async () => {
    edge = await startEdgeProcess(runtime, pg.url, [sidecar]);
    client = connect(edge);
  });

  afterAll(async () => {
    await edge?.stop();
  });

  test("each turn computes only what is new, and says what it would say without a cache", async () => {
    const system = { role: "system" as const, content: `You are ${runtime}, an assistant.` };
    const { id } = await client.conversations.create({ items: [{ type: "message", ...system }] });
    const history: Messages = [system];
    let known = 0;
    for (const question of QUESTIONS) {
      const { text, promptTokens, cachedTokens, totalTokens } = await ask(client, user(question), { conversation: id });
      history.push(...user(question));
      expect(text).toBe(await withoutCache(history));
      history.push({ role: "assistant", content: text });
      // All of the last turn but its last token, of which nobody has needed the KV yet.
      expect(cachedTokens).toBeGreaterThanOrEqual(known - 1);
      expect(cachedTokens).toBeLessThan(promptTokens);
      known = totalTokens;
    }
    const { messages } = (await client.conversations.retrieve(id)) as unknown as { messages: { content: string }[] };
    expect(messages.map(({ content }) => content)).toEqual(history.map(({ content }) => content as string));
  });

  test("a client that sends the whole history as text reuses as much", async () => {
    const history: Messages = [];
    let known = 0;
    for (const question of QUESTIONS) {
      history.push(...user(`${question} (${runtime})`));
      const { text, cachedTokens, totalTokens } = await ask(client, history);
      history.push({ role: "assistant", content: text });
      expect(cachedTokens).toBeGreaterThanOrEqual(known - 1);
      known = totalTokens;
    }
    const edited = [...history.slice(0, 2), ...user("What did I say?")];
    const { text, cachedTokens, promptTokens } = await ask(client, edited);
    expect(text).toBe(await withoutCache(edited));
    expect(cachedTokens).toBeGreaterThan(0);
    expect(cachedTokens).toBeLessThan(promptTokens);
  });

  test("answers do not depend on who is answered at the same time", async () => {
    const asked = [1, 2, 3, 4, 5, 6].map((seed) => ({
      messages: user(`${runtime}: tell me about the number ${seed}`),
      fields: { temperature: 1, seed, max_tokens: 40 },
    }));
    const alone: string[] = [];
    for (const { messages, fields } of asked) alone.push(await withoutCache(messages, fields));
    const together = await Promise.all(asked.map(({ messages, fields }) => ask(client, messages, fields)));
    expect(together.map(({ text }) => text)).toEqual(alone);
    expect(new Set(alone).size).toBeGreaterThan(1);
  });

  test("streams the same text, with a stop string, logprobs and several choices", async () => {
    const messages = user(`What colour is the sky? (${runtime})`);
    const whole = await withoutCache(messages);
    const body = { model: MODEL, messages, temperature: 0, max_tokens: 80 };
    const runner = client.chat.completions.stream({ ...body, n: 2, logprobs: true });
    const final = await runner.finalChatCompletion();
    expect(final.choices.map(({ message }) => message.content)).toEqual([whole, whole]);
    const pieces = final.choices[0]!.logprobs!.content!.map(({ token }) => token);
    expect(pieces.join("")).toBe(whole);
    const stop = whole.slice(4, 7);
    const { text, answer } = await ask(client, messages, { stop: [stop] });
    expect(text).toBe(whole.slice(0, whole.indexOf(stop)));
    expect(answer.choices[0]!.finish_reason).toBe("stop");
  });

  test("a client that leaves ends its generation", async () => {
    const leave = new AbortController();
    const body = { model: MODEL, messages: user(`count (${runtime})`), stream: true as const, ignore_eos: true };
    const stream = await client.chat.completions.create(body, { signal: leave.signal });
    const read = async () => {
      for await (const _ of stream) leave.abort();
    };
    await read().catch(() => {}); // it was aborted
    // What was aborted leaves the batch within a step; a request asks for the count each time.
    let running = Infinity;
    while (running > 0) {
      const stats = await direct.stats();
      running = Number(stats["runningSequences"]) + Number(stats["waitingSequences"]);
    }
    expect((await ask(client, user("hi"))).text).not.toBe("");
  });

  test("the second of two turns at once is refused, and the first is stored", async () => {
    const { id } = await client.conversations.create({});
    const body = { model: MODEL, messages: user("go on"), conversation: id, ignore_eos: true, max_tokens: 200 };
    const stream = await client.chat.completions.create({ ...body, stream: true as const } as never);
    const iterator = (stream as unknown as AsyncIterable<unknown>)[Symbol.asyncIterator]();
    await iterator.next();
    expect(await codeOf(ask(client, user("me too"), { conversation: id }))).toBe("409 conversation_busy");
    while ((await iterator.next()).done !== true);
    const { messages } = (await client.conversations.retrieve(id)) as unknown as { messages: unknown[] };
    expect(messages).toHaveLength(2);
  });

  test("a delete removes the conversation's blocks, and nobody meets them again", async () => {
    const { id } = await client.conversations.create({});
    const secret = `The ${runtime} secret is ${crypto.randomUUID()}. `.repeat(8);
    await ask(client, user(secret), { conversation: id });
    expect((await ask(client, user(secret))).cachedTokens).toBeGreaterThan(64);
    const deleted: unknown = await client.conversations.delete(id);
    const { blocks } = (deleted as { kvasir: { blocks: Record<string, number> } }).kvasir;
    const removed = Object.values(blocks).reduce((sum, count) => sum + count, 0);
    expect(removed).toBeGreaterThan(0);
    expect(await codeOf(client.conversations.retrieve(id))).toBe("404 conversation_not_found");
    // The beginning of the prompt is everybody's; the text is not.
    expect((await ask(client, user(secret))).cachedTokens).toBeLessThan(64);
  });

  test("a delete ends the turn in progress, and takes what it has computed", async () => {
    const { id } = await client.conversations.create({});
    const secret = `${crypto.randomUUID()} is what ${runtime} must forget. `.repeat(8);
    const body = { model: MODEL, messages: user(secret), conversation: id, ignore_eos: true, max_tokens: 1500 };
    const stream = await client.chat.completions.create({ ...body, stream: true } as never);
    let deleted: unknown;
    const read = async () => {
      const chunks = stream as unknown as AsyncIterable<unknown>;
      for await (const _ of chunks) deleted ??= await client.conversations.delete(id);
    };
    expect(await codeOf(read())).toBe("undefined conversation_deleted");
    const { blocks } = (deleted as { kvasir: { blocks: Record<string, number> } }).kvasir;
    expect(Object.values(blocks).reduce((sum, count) => sum + count, 0)).toBeGreaterThan(0);
    expect((await ask(client, user(secret))).cachedTokens).toBeLessThan(64);
  });

  test("kvasir's fields say where the prompt's tokens came from", async () => {
    const { answer } = await ask(client, user(`fields (${runtime})`), { kvasir: { priority: 1, cache_ttl_s: 60 } });
    const { kvasir } = answer as unknown as { kvasir: Record<string, any> };
    expect(kvasir["sidecar"]).toBe("sidecar-1");
    const reasons = Object.values(kvasir["miss_reasons"] as Record<string, number>).reduce((sum, n) => sum + n, 0);
    const cached = Object.values(kvasir["cached_tokens"] as Record<string, number>).reduce((sum, n) => sum + n, 0);
    expect(cached + reasons).toBe(answer.usage!.prompt_tokens);
    expect(kvasir["timings"].ttft_ms).toBeGreaterThan(0);
  });
});
