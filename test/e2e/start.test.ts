// `npm start` as people run it, with everything real: a first start, a stop, a second start, a kill -9 in between, and
// starts that cannot work, which say why and leave nothing behind.

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, truncateSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI from "openai";
import postgres from "postgres";

setDefaultTimeout(120_000);

const ROOT = join(import.meta.dir, "../..");
const MODEL = join(ROOT, "sidecar/models/kvasir-15m-chat");
const SMALL = ["--backend", "cpu", "--gpu-memory", "64M", "--host-memory", "32M", "--disk", "64M"];
let parent: string;

beforeAll(() => {
  parent = mkdtempSync(join(tmpdir(), "kvasir-test-npm-start-"));
});

afterAll(() => {
  rmSync(parent, { recursive: true });
});

function spawn(flags: readonly string[], env: Readonly<Record<string, string>> = {}) {
  const child = Bun.spawn(["node", join(ROOT, "start.mjs"), "start", "--port", "0", ...SMALL, ...flags], {
    cwd: parent, // from anywhere
    stdin: "pipe",
    stdout: "pipe",
    stderr: "pipe",
    env: { ...process.env, HOME: parent, DATABASE_URL: "", NODE_ENV: "production", ...env },
  });
  return { child, errors: new Response(child.stderr).text() };
}

/** Resolves with the API's URL when all is up; throws what was said when it ends before. */
async function start(flags: readonly string[], env: Readonly<Record<string, string>> = {}) {
  const { child, errors } = spawn(flags, env);
  const ready = Promise.withResolvers<string | null>();
  let output = "";
  const read = async () => {
    const decoder = new TextDecoder();
    for await (const chunk of child.stdout) {
      output += decoder.decode(chunk, { stream: true });
      const url = /^ {2}API +(\S+)$/m.exec(output)?.[1];
      if (url !== undefined && output.includes("Ctrl-C\n")) ready.resolve(url);
    }
    ready.resolve(null);
  };
  void read();
  const api = await ready.promise;
  if (api === null) throw new Error(`it ended: ${output}\n${await errors}`);
  const client = new OpenAI({ baseURL: api, apiKey: "none", maxRetries: 0 });
  return { child, api, errors, output: () => output, client };
}

/** The launcher is gone, and with it everything that it started. */
async function expectGone(data: string, { api, errors }: Awaited<ReturnType<typeof start>>): Promise<void> {
  await errors; // they all have its other end, and it is closed when the last of them has ended
  await expect(fetch(`${api}/models`)).rejects.toThrow();
  const sql = postgres(readFileSync(join(data, "postgres/url"), "utf8").trim(), { max: 1, connect_timeout: 2 });
  await expect(sql`select 1`).rejects.toThrow("ECONNREFUSED");
}

describe("npm start", () => {
  const body = { model: "kvasir-15m-chat", max_tokens: 20, temperature: 0 };
  const user = (content: string) => [{ role: "user" as const, content }];

  test("serves, stops in order, serves the same conversations again, and recovers from a kill", async () => {
    const data = join(parent, "data with spaces");
    const first = await start(["--data", data]);
    expect(first.output()).toContain(`data      ${data}`);
    const { id } = await first.client.conversations.create({});
    const turn = { ...body, messages: user("Hi!"), conversation: id };
    const one = await first.client.chat.completions.create(turn as never);
    first.child.kill("SIGTERM");
    expect(await first.child.exited).toBe(0);
    expect(first.output()).toEndWith("stopped\n");
    await expectGone(data, first);

    const second = await start(["--data", data]);
    const found = (await second.client.conversations.retrieve(id)) as unknown as { messages: { content: string }[] };
    const answer = (one as unknown as OpenAI.ChatCompletion).choices[0]!.message.content!;
    expect(found.messages.map(({ content }) => content)).toEqual(["Hi!", answer]);
    const busy = spawn(["--data", data]);
    expect(await busy.child.exited).toBe(1);
    expect(await busy.errors).toContain("is in use by another Kvasir");
    process.kill(second.child.pid, "SIGKILL"); // what npm runs; the rest must notice by itself
    await second.child.exited;
    await expectGone(data, second);

    const third = await start(["--data", data]);
    process.kill(Number(readFileSync(join(data, "launcher.pid"), "utf8")), "SIGKILL");
    expect(await third.child.exited).not.toBe(0);
    const fourth = await start(["--data", data]); // whatever still runs is adopted, or gives way
    await fourth.client.chat.completions.create({ ...turn, messages: user("More.") } as never);
    fourth.child.kill("SIGINT");
    expect(await fourth.child.exited).toBe(0);
    await expectGone(data, fourth);
  });

  test("with an API key lets only those in who know it", async () => {
    const data = join(parent, "key");
    const { api, child, client, output } = await start(["--data", data], { KVASIR_API_KEY: "open sesame" });
    expect(output()).toContain("$KVASIR_API_KEY");
    expect(output()).not.toContain("sesame");
    const list = async () => await client.models.list();
    await expect(list()).rejects.toThrow("401");
    const { data: models } = await new OpenAI({ baseURL: api, apiKey: "open sesame" }).models.list();
    expect(models).toHaveLength(1);
    child.kill("SIGTERM");
    await child.exited;
  });

  test("says in one line what is wrong with a model, and leaves nothing running", async () => {
    const data = join(parent, "broken");
    const cut = join(parent, "cut-model");
    cpSync(MODEL, cut, { recursive: true });
    truncateSync(join(cut, "model.safetensors"), 1_000_000);
    const cases: [string, RegExp][] = [
      [join(parent, "nowhere"), /^sidecar: there is no directory .*nowhere/m],
      [parent, /^sidecar: .* is not a model directory: there is no config\.json in it$/m],
      [cut, /^sidecar: .*model\.safetensors: .* it is cut short$/m],
    ];
    for (const [model, message] of cases) {
      const { child, errors } = spawn(["--data", data, "--model", model]);
      expect(await child.exited).toBe(1);
      expect(await errors).toMatch(message);
      expect(await errors).toMatch(/^kvasir: the sidecar did not start \(exit code 1\): see above$/m);
      expect(await errors).not.toContain("    at ");
      expect(existsSync(join(data, "postgres/cluster/postmaster.pid"))).toBe(false);
    }
  });
});
