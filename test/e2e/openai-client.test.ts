// The `openai` client against edges that run as processes, one on Bun and one on Deno, over one
// database: both must behave the same to the byte that a client sees.

import { afterAll, afterEach, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import OpenAI, { APIError, NotFoundError, RateLimitError } from "openai";
import { type EdgeProcess, RUNTIMES, runEdgeInTerminal, spawnEdge, startEdgeProcess } from "../support/edge-process.ts";
import { echo, FAKE_MODEL, FakeSidecar } from "../support/fake-sidecar.ts";
import type { TestPostgres } from "../support/postgres.ts";
import { startPostgres } from "../support/postgres.ts";

setDefaultTimeout(60_000);

let pg: TestPostgres;
let sidecar: FakeSidecar;

beforeAll(async () => {
  pg = await startPostgres();
  sidecar = new FakeSidecar();
});

afterEach(() => {
  sidecar.script = echo;
});

afterAll(async () => {
  await sidecar?.stop();
  await pg?.remove();
});

/** What the client's promise was rejected with; its promises are not native ones. */
async function failureOf(work: PromiseLike<unknown>): Promise<unknown> {
  try {
    return { succeeded: await work };
  } catch (error) {
    return error;
  }
}

/** Has the sidecar answer until it is told to stop. */
function untilAborted() {
  const { promise: isRunning, resolve: run } = Promise.withResolvers<void>();
  const { promise: isAborted, resolve: aborted } = Promise.withResolvers<void>();
  sidecar.script = async (fake) => {
    fake.delta("half");
    run();
    await fake.aborted;
    aborted();
  };
  return { leave: new AbortController(), isRunning, isAborted };
}

const messages = [{ role: "user" as const, content: "hello big world" }];

describe.each([...RUNTIMES])("the edge on %s", (runtime) => {
  let edge: EdgeProcess;
  let client: OpenAI;

  beforeAll(async () => {
    edge = await startEdgeProcess(runtime, pg.url, [sidecar], ["--drain-timeout", "20"]);
    client = new OpenAI({ baseURL: `${edge.url}/v1`, apiKey: "none", maxRetries: 0 });
  });

  afterAll(async () => {
    await edge?.stop();
  });

  test("answers", async () => {
    const answer = await client.chat.completions.create({ model: FAKE_MODEL, messages });
    expect(answer.choices[0]!.message.content).toBe("hello big world");
    expect(answer.usage!.prompt_tokens_details!.cached_tokens).toBe(8);
  });

  test("streams, with usage at the end", async () => {
    const stream = await client.chat.completions.create({
      model: FAKE_MODEL,
      messages,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let usage: OpenAI.CompletionUsage | null | undefined;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    expect(text).toBe("hello big world");
    expect(usage!.total_tokens).toBe(13);
  });

  test("satisfies the client's stream helper, with two choices", async () => {
    const runner = client.chat.completions.stream({ model: FAKE_MODEL, messages, n: 2 });
    const final = await runner.finalChatCompletion();
    expect(final.choices.map((choice) => choice.message.content)).toEqual([
      "hello big world",
      "hello big world",
    ]);
  });

  test("keeps a conversation over its turns", async () => {
    const made = await client.conversations.create({
      items: [{ type: "message", role: "system", content: "be brief" }],
    });
    for (const content of ["one", "two"]) {
      const body = { model: FAKE_MODEL, messages: [{ role: "user" as const, content }] };
      await client.chat.completions.create({ ...body, conversation: made.id } as typeof body);
    }
    expect(sidecar.submits.at(-1)!.messages.map(({ content }) => content)).toEqual([
      "be brief",
      "one",
      "one",
      "two",
    ]);
    const renamed = await client.conversations.update(made.id, { metadata: { title: "numbers" } });
    expect(renamed.metadata).toEqual({ title: "numbers" });
    const deleted = await client.conversations.delete(made.id);
    expect(deleted.deleted).toBe(true);
    expect(await failureOf(client.conversations.retrieve(made.id))).toBeInstanceOf(NotFoundError);
  });

  test("lists its models", async () => {
    const { data } = await client.models.list();
    expect(data.map(({ id }) => id)).toEqual([FAKE_MODEL]);
  });

  test("raises the client's error classes", async () => {
    const unknown = client.chat.completions.create({ model: "gpt-99", messages });
    expect(await failureOf(unknown)).toBeInstanceOf(NotFoundError);
    sidecar.script = (stream) => stream.error("queue_full", "full");
    const refused = client.chat.completions.create({ model: FAKE_MODEL, messages, stream: true });
    expect(await failureOf(refused)).toBeInstanceOf(RateLimitError);
  });

  test("raises an error in mid-stream when the sidecar dies, and goes on afterwards", async () => {
    sidecar.script = (stream) => {
      stream.delta("half");
      stream.cut();
    };
    const stream = await client.chat.completions.create({ model: FAKE_MODEL, messages, stream: true });
    let text = "";
    const read = async () => {
      for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
    };
    const error = await failureOf(read());
    expect(error).toBeInstanceOf(APIError);
    expect((error as APIError).code).toBe("sidecar_lost");
    expect(text).toBe("half");
    sidecar.script = echo;
    await client.chat.completions.create({ model: FAKE_MODEL, messages });
  });

  test("aborts the generation when the client leaves a stream", async () => {
    const { leave, isAborted, isRunning } = untilAborted();
    const options = { signal: leave.signal };
    const stream = await client.chat.completions.create(
      { model: FAKE_MODEL, messages, stream: true },
      options,
    );
    const read = async () => {
      for await (const _ of stream);
    };
    const ended = failureOf(read());
    await isRunning;
    leave.abort();
    await isAborted;
    await ended;
  });

  // In one packet with its head, as fetch sends a short body: edge/serve.ts says why that matters.
  test("aborts the generation when the client leaves before a plain answer", async () => {
    const { leave, isAborted, isRunning } = untilAborted();
    const answer = fetch(`${edge.url}/v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: FAKE_MODEL, messages }),
      signal: leave.signal,
    });
    const ended = failureOf(answer);
    await isRunning;
    leave.abort();
    await isAborted;
    await ended;
  });

  test("finishes its answers on SIGTERM, refuses new ones, and exits with 0", async () => {
    const own = await startEdgeProcess(runtime, pg.url, [sidecar]);
    const to = new OpenAI({ baseURL: `${own.url}/v1`, apiKey: "none", maxRetries: 0 });
    const { promise: isRunning, resolve: run } = Promise.withResolvers<void>();
    const { promise: isReleased, resolve: release } = Promise.withResolvers<void>();
    sidecar.script = async (stream) => {
      stream.delta("last words");
      run();
      await isReleased;
      stream.done();
    };
    const answer = to.chat.completions.create({ model: FAKE_MODEL, messages });
    await isRunning;
    const exit = own.stop();
    // Until the signal has arrived new requests are answered; then they are refused.
    for (;;) {
      const list = await to.models.list().catch((error: unknown) => error);
      if (list instanceof APIError) {
        expect(list).toMatchObject({ status: 503, code: "shutting_down" });
        break;
      }
    }
    release();
    expect((await answer).choices[0]!.message.content).toBe("last words");
    expect(await exit).toBe(0);
  });

  test("asks nothing in a terminal", async () => {
    const output = await runEdgeInTerminal(runtime, ["--help"], "Allow?");
    expect(output).toContain("bun run edge, or deno task edge: ");
    expect(output).not.toContain("Allow?");
  });

  test("says in one line why it cannot start", async () => {
    const cases: [string, string[], string][] = [
      [pg.url, ["--port", new URL(edge.url).port], "in use"],
      ["postgres://kvasir@127.0.0.1:1/postgres", [], "cannot reach the database at"],
      [pg.url, ["--nonsense"], "--help lists the options"],
    ];
    for (const [databaseUrl, flags, message] of cases) {
      const child = spawnEdge(runtime, databaseUrl, [sidecar], flags);
      const output = await new Response(child.stderr).text();
      expect(await child.exited).toBe(1);
      const lines = output.trim().split("\n").filter((line) => line.startsWith("edge: "));
      expect(lines).toHaveLength(1);
      expect(lines[0]).toContain(message);
    }
  });
});
