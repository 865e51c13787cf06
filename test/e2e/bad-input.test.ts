// What clients send that cannot work: each gets a clear answer, and the server lives on. On a real sidecar, through
// edges on Bun and on Deno.

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type EdgeProcess, RUNTIMES, startEdgeProcess } from "../support/edge-process.ts";
import { startPostgres, type TestPostgres } from "../support/postgres.ts";
import { MODEL, type SidecarProcess, startSidecarProcess } from "../support/sidecar-process.ts";

setDefaultTimeout(60_000);

const data = mkdtempSync(join(tmpdir(), "kvasir-test-bad-"));
let pg: TestPostgres;
let sidecar: SidecarProcess;

beforeAll(async () => {
  [pg, sidecar] = await Promise.all([startPostgres(), startSidecarProcess({ data })]);
});

afterAll(async () => {
  await sidecar?.stop();
  await pg?.remove();
  rmSync(data, { recursive: true });
});

const messages = [{ role: "user", content: "hi" }];
const chat = (changes: object) => JSON.stringify({ model: MODEL, messages, max_tokens: 5, ...changes });
const said = (content: unknown, role = "user") => chat({ messages: [{ role, content }] });
/** Longer than the window of 2,048 tokens, whatever the tokenizer makes of it. */
const LONG = "word ".repeat(4000);

type Case = readonly [what: string, body: string | Uint8Array<ArrayBuffer>, status: number, message: string | RegExp];

const CASES: readonly Case[] = [
  ["invalid JSON", '{"model": ', 400, "not valid JSON"],
  ["no object", "[]", 400, /expected object/i],
  ["nothing", "", 400, "model"],
  ["invalid UTF-8", Uint8Array.from(Buffer.from(said("caf\xe9"), "latin1")), 400, "not valid UTF-8"],
  ["deep nesting", `${"[".repeat(100_000)}${"]".repeat(100_000)}`, 400, "nests deeper than 32 levels"],
  ["a wrong type", chat({ temperature: "hot" }), 400, "temperature"],
  ["an unknown role", said("hi", "wizard"), 400, "messages.0.role: must be one of"],
  ["no messages", chat({ messages: [] }), 400, "messages"],
  ["messages that are none", chat({ messages: "hi" }), 400, "messages"],
  ["a picture", said([{ type: "image_url", image_url: { url: "x" } }]), 400, "other parts are not supported"],
  ["half a surrogate pair", said("\ud800"), 400, "well-formed Unicode"],
  ["an unknown model", chat({ model: "gpt-99" }), 404, 'The model "gpt-99" does not exist here'],
  ["negative max_tokens", chat({ max_tokens: -1 }), 400, "max_tokens"],
  ["half a token", chat({ max_tokens: 1.5 }), 400, "must be an integer"],
  ["a prompt longer than the context", chat({ messages: [{ role: "user", content: LONG }], truncation: "disabled" }),
    400, /maximum context length is 2048 tokens, but the messages come to \d{4}/],
  ["a body over the limit", said("x".repeat(9 * 2 ** 20)), 413, "longer than 8388608 bytes"],
  ["10,000 stop strings", chat({ stop: Array(10_000).fill("x") }), 400, "stop"],
  ["NaN in logit_bias", chat({}).replace("}", '}, "logit_bias": {"5": NaN}').replace("}, \"logit_bias\"", ', "x": 1}'),
    400, "not valid JSON"],
  ["infinity in logit_bias", chat({ logit_bias: { 5: 0 } }).replace('"5":0', '"5":1e999'), 400, "logit_bias"],
  ["a token that is none in logit_bias", chat({ logit_bias: { 99_999_999: 1 } }), 400, "logit_bias names token"],
  ["an unknown conversation", chat({ conversation: "01a20e24-56e0-7348-85b2-ece14305869f" }), 404, "no conversation"],
  ["a conversation that is none", chat({ conversation: "../etc/passwd" }), 404, "no conversation"],
  ["tools", chat({ tools: [{ type: "function" }] }), 400, "tools are not supported"],
  ["17 choices", chat({ n: 17 }), 400, "n: "],
];

describe.each([...RUNTIMES])("bad input to the edge on %s", (runtime) => {
  let edge: EdgeProcess;

  beforeAll(async () => {
    edge = await startEdgeProcess(runtime, pg.url, [sidecar]);
  });

  afterAll(async () => {
    await edge?.stop();
  });

  const post = (body: string | Uint8Array<ArrayBuffer>, type = "application/json") =>
    fetch(`${edge.url}/v1/chat/completions`, { method: "POST", headers: { "content-type": type }, body });

  async function expectAlive(): Promise<void> {
    expect((await post(chat({}))).status).toBe(200);
  }

  test.each([...CASES])("%s", async (_what, body, status, message) => {
    const response = await post(body);
    const { error } = (await response.json()) as { error: { message: string; type: string; code: string } };
    expect(error.message).toMatch(message);
    expect(response.status).toBe(status);
    expect(error.type).toBe("invalid_request_error");
    expect(error.code).not.toBe("");
    await expectAlive();
  });

  test("the newer word for a system message", async () => {
    const developer = { role: "developer", content: "Be brief." };
    const response = await post(chat({ messages: [developer, ...messages] }));
    expect(response.status).toBe(200);
    await response.json();
  });

  test("a huge max_tokens is as much as there is room for", async () => {
    const response = await post(chat({ max_tokens: 2 ** 53, stop: [" "], truncation: "disabled" }));
    expect(response.status).toBe(200);
    await response.json();
  });

  test("a body that is not JSON by its own words", async () => {
    const response = await post(chat({}), "text/plain");
    expect(response.status).toBe(415);
    await response.json();
  });

  test("a method or path that is not there", async () => {
    const response = await fetch(`${edge.url}/v1/chat/completions`);
    expect(response.status).toBe(404);
    expect(await response.json()).toMatchObject({ error: { code: "unknown_url" } });
  });

  test("a body that is cut off, and one that never says how long it is", async () => {
    const { port } = new URL(edge.url);
    for (const head of ["content-length: 500", "transfer-encoding: chunked"]) {
      const closed = Promise.withResolvers<void>();
      const socket = await Bun.connect({
        hostname: "127.0.0.1", port: Number(port), socket: { data() {}, close: () => closed.resolve() },
      });
      const heads = ["POST /v1/chat/completions HTTP/1.1", "host: localhost", "content-type: application/json", head];
      socket.write(`${heads.join("\r\n")}\r\n\r\n`);
      socket.write(head.startsWith("content") ? '{"model"' : "8\r\n{\"model\"\r\n");
      socket.flush();
      socket.end();
      await closed.promise;
    }
    await expectAlive();
  });
});
