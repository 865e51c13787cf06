// POST /v1/chat/completions against a scripted sidecar and a real database.

import { afterAll, afterEach, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { sql } from "drizzle-orm";
import * as schemas from "../../edge/api-schemas.ts";
import { FakeSidecar, echo } from "../support/fake-sidecar.ts";
import { errorOf, readEvents, startEdge, type TestEdge, user } from "../support/edge.ts";
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
  edge = await startEdge(pg.url, [sidecar], ["--body-limit-bytes", "100000"]);
});

afterEach(() => {
  sidecar.script = echo;
});

afterAll(async () => {
  await edge?.close();
  await sidecar?.stop();
  await pg?.remove();
});

/** Row of the newest request. */
async function lastRequestRow(): Promise<Record<string, unknown>> {
  const rows = await edge.services.database.run((orm) =>
    orm.execute(sql`select * from requests order by id desc limit 1`),
  );
  return rows[0]!;
}

const chunksOf = (events: string[]) =>
  events.slice(0, -1).map((event) => JSON.parse(event) as Record<string, any>);

describe("a plain answer", () => {
  test("has OpenAI's shape, with usage, and leaves a request row", async () => {
    const response = await edge.chat({});
    expect(response.status).toBe(200);
    expect(response.headers.get("x-request-id")).toBeString();
    const body = (await response.json()) as Record<string, any>;
    expect(violations("CreateChatCompletionResponse", body)).toEqual([]);
    schemas.chatCompletion.parse(body);
    expect(body["choices"][0].message.content).toBe("hello big world");
    expect(body["usage"]).toMatchObject({
      prompt_tokens: 10,
      completion_tokens: 3,
      total_tokens: 13,
      prompt_tokens_details: { cached_tokens: 8 },
    });
    expect(body["kvasir"].cached_tokens).toEqual({ gpu: 5, host: 2, disk: 1 });
    expect(await lastRequestRow()).toMatchObject({
      model: "tiny",
      sidecar: "fake",
      is_stream: false,
      prompt_tokens: 10,
      cached_gpu_tokens: 5,
      ttft_ms: 3,
      finish_reason: "stop",
      error: null,
      miss_reasons: { absent: 2 },
    });
  });

  test("says what the cache chose and expected, in the answer and in the request row", async () => {
    const cache = {
      choice: "split", predictedLoadMs: 12.5, predictedRecomputeMs: 80, loadedBytes: 2 ** 40, droppedTokens: 128,
      isViewRestarted: true,
    } as const;
    sidecar.script = (stream) => stream.done({ cache });
    const kvasir = { cache_ttl_s: 3600, priority: 2 };
    const body = (await (await edge.chat({ kvasir })).json()) as any;
    schemas.chatCompletion.parse(body);
    expect(body.kvasir.cache).toEqual({
      choice: "split", predicted_load_ms: 12.5, predicted_recompute_ms: 80, loaded_bytes: 2 ** 40, dropped_tokens: 128,
      view_restarted: true,
    });
    expect(sidecar.submits.at(-1)).toMatchObject({ cacheTtlS: 3600, priority: 2 });
    expect(await lastRequestRow()).toMatchObject({
      cache_choice: "split",
      predicted_load_ms: 12.5,
      predicted_recompute_ms: 80,
      loaded_bytes: String(2 ** 40),
      dropped_tokens: 128,
      view_restarted: true,
      cache_ttl_s: 3600,
      cache_priority: 2,
    });
  });

  test("carries logprobs and several choices", async () => {
    sidecar.script = (stream) => {
      const top = [{ token: "no", bytes: [110, 111], logprob: -2 }];
      const logprobs = [{ token: "yes", bytes: [121, 101, 115], logprob: -0.1, top }];
      stream.delta("yes", 0, 1, logprobs);
      stream.delta("no", 1, 1, null);
      stream.done({ finishReasons: ["stop", "length"] });
    };
    const body = (await (await edge.chat({ n: 2, logprobs: true, top_logprobs: 1 })).json()) as any;
    expect(violations("CreateChatCompletionResponse", body)).toEqual([]);
    schemas.chatCompletion.parse(body);
    expect(body.choices.map((choice: any) => choice.finish_reason)).toEqual(["stop", "length"]);
    expect(body.choices[0].logprobs.content[0]).toMatchObject({ token: "yes", logprob: -0.1 });
    expect(body.choices[1].message.content).toBe("no");
  });
});

describe("a stream", () => {
  test("is role, text, finish reason, [DONE], each chunk in OpenAI's shape", async () => {
    const response = await edge.chat({ stream: true });
    expect(response.headers.get("content-type")).toStartWith("text/event-stream");
    const events = await readEvents(response);
    expect(events.at(-1)).toBe("[DONE]");
    const chunks = chunksOf(events);
    for (const chunk of chunks) {
      expect(violations("CreateChatCompletionStreamResponse", chunk)).toEqual([]);
      expect(Object.hasOwn(chunk, "usage")).toBe(false);
      expect(chunk["id"]).toBe(chunks[0]!["id"]);
    }
    const deltas = chunks.map((chunk) => chunk["choices"][0].delta);
    expect(deltas[0]).toMatchObject({ role: "assistant", content: "" });
    expect(deltas.map((delta) => delta.content ?? "").join("")).toBe("hello big world");
    const reasons = chunks.map((chunk) => chunk["choices"][0].finish_reason);
    expect(reasons.filter((reason) => reason !== null)).toEqual(["stop"]);
    expect(reasons.at(-1)).toBe("stop");
  });

  test("ends with usage and no choices when asked", async () => {
    const events = await readEvents(
      await edge.chat({ stream: true, stream_options: { include_usage: true } }),
    );
    const chunks = chunksOf(events);
    for (const chunk of chunks) {
      expect(violations("CreateChatCompletionStreamResponse", chunk)).toEqual([]);
    }
    expect(chunks.at(-1)).toMatchObject({ choices: [], usage: { prompt_tokens: 10 } });
    for (const chunk of chunks.slice(0, -1)) expect(chunk["usage"]).toBeNull();
  });

  test("keeps the choices apart by index and skips empty deltas", async () => {
    sidecar.script = (stream) => {
      stream.delta("a", 0);
      stream.delta("", 0);
      stream.delta("b", 1);
      stream.done();
    };
    const chunks = chunksOf(await readEvents(await edge.chat({ stream: true, n: 2 })));
    const text = (index: number) =>
      chunks
        .map((chunk) => chunk["choices"][0])
        .filter((choice) => choice.index === index)
        .map((choice) => choice.delta.content ?? "")
        .join("");
    expect([text(0), text(1)]).toEqual(["a", "b"]);
    const finishes = chunks.filter((chunk) => chunk["choices"][0].finish_reason !== null);
    expect(finishes).toHaveLength(2);
  });

  test("gets its status before the first token: refusals are plain errors", async () => {
    sidecar.script = (stream) => stream.error("queue_full", "256 are waiting", 3);
    const response = await edge.chat({ stream: true });
    expect(response.headers.get("retry-after")).toBe("3");
    expect(await errorOf(response)).toMatchObject({ status: 429, code: "queue_full" });
    expect((await lastRequestRow())["error"]).toBe("queue_full");
  });

  test("tells an error after the first token inside the stream, and does not say [DONE]", async () => {
    sidecar.script = (stream) => {
      stream.delta("half");
      stream.error("internal", "the engine failed");
    };
    const events = await readEvents(await edge.chat({ stream: true }));
    const last = JSON.parse(events.at(-1)!) as { error: { code: string } };
    expect(violations("ErrorResponse", last)).toEqual([]);
    expect(last.error.code).toBe("internal");
  });

  test("sends comments while nothing comes, also before the first token", async () => {
    const own = await startEdge(pg.url, [sidecar], ["--keep-alive-ms", "20"]);
    const { promise: isWanted, resolve: want } = Promise.withResolvers<void>();
    sidecar.script = async (stream) => {
      await isWanted;
      echo(stream);
    };
    const response = await own.chat({ stream: true });
    expect(response.status).toBe(200);
    const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
    expect((await reader.read()).value).toBe(": keep-alive\n\n");
    want();
    let text = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) text += part.value;
    expect(text).toEndWith("data: [DONE]\n\n");
    await own.close();
  });
});

describe("bad input", () => {
  test("gets an OpenAI error with the right status, and the server lives on", async () => {
    const cases: [unknown, number, string, string | null][] = [
      ["{", 400, "invalid_request", null],
      ["[".repeat(5000), 400, "invalid_request", null],
      [[], 400, "invalid_request", null],
      [{ ...user("x"), messages: [] }, 400, "invalid_request", "messages"],
      [{ ...user("x"), max_tokens: -5 }, 400, "invalid_request", "max_tokens"],
      [{ ...user("x"), model: "gpt-99" }, 404, "model_not_found", "model"],
      [{ ...user("x"), conversation: "nope" }, 404, "conversation_not_found", "conversation"],
      [
        { ...user("x"), conversation: "01a20e24-56e0-7348-85b2-ece14305869f" },
        404,
        "conversation_not_found",
        "conversation",
      ],
      [user("x".repeat(100_001)), 413, "body_too_large", null],
    ];
    for (const [body, status, code, param] of cases) {
      const response = await edge.post("/v1/chat/completions", body);
      const answer = (await response.json()) as { error: unknown };
      expect(violations("ErrorResponse", answer)).toEqual([]);
      schemas.errorResponse.parse(answer);
      expect({ status: response.status, ...(answer.error as object) }).toMatchObject({ status, code, param });
    }
    expect((await edge.chat({})).status).toBe(200);
  });

  test("that only the sidecar can see comes back from it", async () => {
    sidecar.script = (stream) =>
      stream.error("context_length_exceeded", "the prompt has 3000 tokens, the context 2048");
    expect(await errorOf(await edge.chat({ truncation: "disabled" }))).toMatchObject({
      status: 400,
      code: "context_length_exceeded",
      message: "the prompt has 3000 tokens, the context 2048",
      param: "messages",
    });
  });

  test("huge max_tokens are cut to the context", async () => {
    await edge.chat({ max_tokens: 1e12 });
    expect(sidecar.submits.at(-1)!.sampling.maxTokens).toBe(2048);
  });

  test("other types and hosts are refused", async () => {
    const plain = await edge.post("/v1/chat/completions", {}, { headers: { "content-type": "text/plain" } });
    expect(plain.status).toBe(415);
    const rebound = await edge.chat({}, { headers: { host: "evil.example:8787" } });
    expect(await errorOf(rebound)).toMatchObject({ status: 403, code: "host_not_allowed" });
    expect((await edge.request("/v1/nothing")).status).toBe(404);
  });
});

describe("a client that leaves", () => {
  test("aborts its answer at once, streaming or not; the request is recorded as such", async () => {
    for (const stream of [true, false]) {
      const { promise: aborted, resolve } = Promise.withResolvers<void>();
      const { promise: isRunning, resolve: run } = Promise.withResolvers<void>();
      sidecar.script = async (fake) => {
        fake.delta("half");
        run();
        await fake.aborted;
        resolve();
      };
      const leave = new AbortController();
      const answer = edge.chat({ stream }, { signal: leave.signal });
      await isRunning;
      if (stream) {
        const reader = (await answer).body!.getReader();
        await reader.read();
        await reader.cancel();
      } else {
        leave.abort();
        await answer.catch(() => {}); // nobody is there to read it
      }
      await aborted;
      await edge.services.drain.whenIdle();
      expect(await lastRequestRow()).toMatchObject({ finish_reason: "abort", is_stream: stream });
    }
  });
});

describe("a client that reads slowly", () => {
  test("gets the same text in fewer chunks", async () => {
    sidecar.script = (stream) => {
      for (let i = 0; i < 500; i++) stream.delta(`${i} `);
      stream.done();
    };
    const response = await edge.chat({ stream: true });
    // The deltas merge while nobody reads; another answer's end shows that they have arrived.
    const later = await edge.chat({});
    await later.text();
    const chunks = chunksOf(await readEvents(response));
    const text = chunks.map((chunk) => chunk["choices"][0].delta.content ?? "").join("");
    expect(text).toBe(Array.from({ length: 500 }, (_, i) => `${i} `).join(""));
    expect(chunks.length).toBeLessThan(100);
  });
});

describe("a stop", () => {
  test("refuses new requests, and past its limit ends the answers in progress", async () => {
    const own = await startEdge(pg.url, [sidecar]);
    let aborted: Promise<void> | undefined;
    sidecar.script = (stream) => {
      aborted = stream.aborted;
      stream.delta("half");
    };
    const stream = await own.chat({ stream: true });
    const idle = own.services.drain.begin();
    expect(await errorOf(await own.chat({}))).toMatchObject({ status: 503, code: "shutting_down" });
    expect((await own.request("/readyz")).status).toBe(503);
    own.services.drain.cut();
    await aborted;
    const events = await readEvents(stream);
    await idle;
    expect(JSON.parse(events.at(-1)!)).toMatchObject({ error: { code: "shutting_down" } });
    await own.close();
  });
});

describe("two sidecars of one name", () => {
  test("are not both used: deletes are kept by name", async () => {
    const twins = [new FakeSidecar({ name: "twin" }), new FakeSidecar({ name: "twin" })];
    const own = await startEdge(pg.url, twins);
    await Promise.all(twins.map((twin) => twin.until(() => twin.frames.length > 0)));
    await own.chat({});
    await own.chat({});
    expect(own.services.sidecars.clients.filter((client) => client.isReady)).toHaveLength(1);
    await own.close();
    await Promise.all(twins.map((twin) => twin.stop()));
  });
});

describe("limits", () => {
  test("more answers at once than --max-in-flight are refused with 429", async () => {
    const own = await startEdge(pg.url, [sidecar], ["--max-in-flight", "1"]);
    const { promise: isWanted, resolve: want } = Promise.withResolvers<void>();
    const { promise: isRunning, resolve: run } = Promise.withResolvers<void>();
    sidecar.script = async (stream) => {
      run();
      await isWanted;
      echo(stream);
    };
    const first = own.chat({});
    await isRunning;
    expect(await errorOf(await own.chat({}))).toMatchObject({ status: 429, code: "too_many_requests" });
    want();
    expect((await first).status).toBe(200);
    await own.close();
  });

  test("a sidecar that hangs past the deadline is given up with 504", async () => {
    const own = await startEdge(pg.url, [sidecar], ["--request-timeout-ms", "10"]);
    let wasAborted: Promise<void> | undefined;
    sidecar.script = (stream) => {
      wasAborted = stream.aborted;
    };
    expect(await errorOf(await own.chat({}))).toMatchObject({ status: 504, code: "deadline_exceeded" });
    await wasAborted;
    await own.close();
  });

  test("an API key is wanted where one is set", async () => {
    const { createApp } = await import("../../edge/app.ts");
    const config = { ...edge.services.config, apiKey: "k1" };
    const app = createApp({ ...edge.services, config }, null as never);
    const get = (headers: Record<string, string>) =>
      app.request("/v1/models", { headers: { host: "localhost", ...headers } });
    const refusal = async (headers: Record<string, string>) => {
      const response = await get(headers);
      expect(response.status).toBe(401);
      return ((await response.json()) as { error: { message: string } }).error.message;
    };
    expect(await refusal({})).toBe("Send the API key as Authorization: Bearer KEY.");
    expect(await refusal({ authorization: "k1" })).toBe("Send the API key as Authorization: Bearer KEY.");
    expect(await refusal({ authorization: "Bearer k2" })).toBe("The API key is wrong.");
    expect(await refusal({ authorization: "Bearer K1" })).toBe("The API key is wrong.");
    expect(await refusal({ authorization: "Basic k1" })).toBe("Send the API key as Authorization: Bearer KEY.");
    for (const scheme of ["Bearer", "bearer", "BEARER "]) {
      expect((await get({ authorization: `${scheme} k1` })).status).toBe(200);
    }
  });
});

describe("models, health and the API description", () => {
  test("list and show the model", async () => {
    const list = await (await edge.request("/v1/models")).json();
    expect(violations("ListModelsResponse", list)).toEqual([]);
    schemas.modelList.parse(list);
    const model = (await (await edge.request("/v1/models/tiny")).json()) as { id: string };
    expect(model.id).toBe("tiny");
    expect((await edge.request("/v1/models/org/other")).status).toBe(404);
  });

  test("ready only while the database and a sidecar answer", async () => {
    expect((await edge.request("/healthz")).status).toBe(200);
    const ready = await edge.request("/readyz");
    expect(ready.status).toBe(200);
    schemas.readiness.parse(await ready.json());
    const away = new FakeSidecar();
    await away.stop();
    const own = await startEdge(pg.url, [away]);
    expect((await own.request("/healthz")).status).toBe(200);
    expect((await own.request("/readyz")).status).toBe(503);
    await own.close();
  });

  test("describe every route", async () => {
    const doc = (await (await edge.request("/openapi.json")).json()) as { paths: object };
    const routes = edge.app.routes
      .filter((route) => route.method !== "ALL" && route.path !== "/openapi.json")
      .map((route) => route.path.replace(/:id(\{.*\})?/, "{id}"));
    expect(Object.keys(doc.paths).toSorted()).toEqual([...new Set(routes)].toSorted());
  });

  test("describe the key, what errors there are, and when to come back", async () => {
    const doc = await (await edge.request("/openapi.json")).json();
    expect(doc).toMatchObject({
      security: [{}, { key: [] }],
      components: { securitySchemes: { key: { type: "http", scheme: "bearer" } } },
      paths: {
        "/v1/chat/completions": { post: { responses: { 429: { headers: { "Retry-After": {} } }, 504: {} } } },
        "/v1/models": { get: { responses: { 401: {} } } },
        "/healthz": { get: { security: [] } },
      },
    });
    const { properties } = (doc as { components: { schemas: Record<string, { properties: object }> } }).components
      .schemas["CreateChatCompletionRequest"]!;
    expect(properties).toMatchObject({ max_tokens: { type: ["integer", "null"], minimum: 1 } });
  });
});
