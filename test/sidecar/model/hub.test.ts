// Downloads from a server that speaks the hub's API: resumed, verified, offline, refused.

import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { resolveModel } from "../../../sidecar/model/hub.ts";
import { type HubFile, HubServer } from "../../support/hub-server.ts";

const MODEL = "kvasir-tests/tiny";
const text = (content: string): HubFile => ({ content: new TextEncoder().encode(content), isLfs: false });
const WEIGHTS = new Uint8Array(3_000_000);
for (let at = 0; at < WEIGHTS.length; at += 60_000) crypto.getRandomValues(WEIGHTS.subarray(at, at + 60_000));
const FILES = {
  "config.json": text("{}"),
  "generation_config.json": text('{"eos_token_id": 2}'),
  "tokenizer.json": { content: new TextEncoder().encode('{"model": {}}'), isLfs: true },
  "tokenizer_config.json": text("{}"),
  "model.safetensors": { content: WEIGHTS, isLfs: true },
  "pytorch_model.bin": text("not wanted"),
  "README.md": text("not wanted"),
};

let hub: HubServer;
let home: string;
let messages: string[];

beforeAll(async () => {
  hub = await HubServer.start();
});
afterAll(() => hub.stop());

beforeEach(() => {
  home = mkdtempSync(join(tmpdir(), "kvasir-hub-"));
  messages = [];
  hub.models.clear();
  hub.models.set(MODEL, FILES);
  hub.requests.length = 0;
  hub.cuts.length = 0;
  hub.tampered.clear();
  hub.token = null;
  hub.ignoresRange = false;
});
afterEach(() => rmSync(home, { recursive: true }));

function resolve(model = MODEL, env: Record<string, string> = {}): Promise<string> {
  return resolveModel(model, {
    env: { HF_HOME: home, HF_ENDPOINT: hub.url, ...env },
    onProgress: (message) => messages.push(message),
    retryDelayMs: 1,
  });
}

async function refusal(model = MODEL, env: Record<string, string> = {}): Promise<string> {
  const error = await resolve(model, env).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(Error);
  expect((error as Error).name).toBe("HubError");
  return (error as Error).message;
}

/** The Range header of each request for the weights. */
function weightsRequests(): (string | null)[] {
  return hub.requests
    .filter(({ origin, path }) => origin === "storage" && path.endsWith("/model.safetensors"))
    .map(({ range }) => range);
}

const cache = (): string => join(home, "hub", "models--kvasir-tests--tiny");

describe("a local model", () => {
  test("is its directory as it is", async () => {
    expect(await resolve("sidecar/models/kvasir-15m-chat")).toBe("sidecar/models/kvasir-15m-chat");
  });

  test("without config.json is refused", async () => {
    expect(await refusal("sidecar/models")).toContain("there is no config.json in it");
  });

  test("that is nowhere is refused without asking the hub", async () => {
    expect(await refusal("/no/such/model")).toContain("there is no directory /no/such/model");
    expect(hub.requests).toHaveLength(0);
  });
});

describe("a model of the hub", () => {
  test("comes into the cache as other programs lay it out, with only the files that are needed", async () => {
    const directory = await resolve();
    expect(directory).toBe(join(cache(), "snapshots", hub.commitOf(MODEL)));
    expect(readdirSync(directory).sort()).toEqual([
      "config.json",
      "generation_config.json",
      "model.safetensors",
      "tokenizer.json",
      "tokenizer_config.json",
    ]);
    expect(readFileSync(join(directory, "model.safetensors")).equals(WEIGHTS)).toBe(true);
    const sha256 = new Bun.CryptoHasher("sha256").update(WEIGHTS).digest("hex");
    expect(readlinkSync(join(directory, "model.safetensors"))).toBe(`../../blobs/${sha256}`);
    expect(readFileSync(join(cache(), "refs", "main"), "utf8")).toBe(hub.commitOf(MODEL));
    expect(messages.at(-1)).toContain("100 %");
  });

  test("is not downloaded twice", async () => {
    const first = await resolve();
    hub.requests.length = 0;
    expect(await resolve()).toBe(first);
    expect(hub.requests.filter(({ path }) => path.includes("resolve"))).toHaveLength(0);
  });

  test("that changes is downloaded again, but not the files that stayed", async () => {
    await resolve();
    hub.models.set(MODEL, { ...FILES, "config.json": text('{"a": 1}') });
    hub.requests.length = 0;
    const directory = await resolve();
    expect(readFileSync(join(directory, "config.json"), "utf8")).toBe('{"a": 1}');
    expect(weightsRequests()).toHaveLength(0);
  });

  test("may be asked for by branch or commit", async () => {
    const commit = hub.commitOf(MODEL);
    expect(await resolve(`${MODEL}@main`)).toBe(await resolve(`${MODEL}@${commit}`));
    expect(await refusal(`${MODEL}@v2`)).toContain("no model kvasir-tests/tiny at v2");
  });

  test("goes into HF_HUB_CACHE when that is set", async () => {
    const directory = await resolve(MODEL, { HF_HUB_CACHE: join(home, "elsewhere") });
    expect(directory).toStartWith(join(home, "elsewhere", "models--kvasir-tests--tiny"));
  });
});

describe("a download", () => {
  test("that is cut goes on where it stopped", async () => {
    hub.models.set(MODEL, { ...FILES, "tokenizer.json": text("{}") });
    hub.cuts.push(1_000_000, 700_000);
    const directory = await resolve();
    expect(readFileSync(join(directory, "model.safetensors")).equals(WEIGHTS)).toBe(true);
    const ranges = weightsRequests();
    expect(ranges[0]).toBeNull();
    expect(ranges.length).toBe(3);
    expect(ranges.at(-1)).toMatch(/^bytes=[1-9]\d*-$/);
  });

  test("that an earlier start left behind goes on where it stopped", async () => {
    await resolve();
    const sha256 = new Bun.CryptoHasher("sha256").update(WEIGHTS).digest("hex");
    rmSync(home, { recursive: true });
    const blob = join(cache(), "blobs", sha256);
    await Bun.write(`${blob}.incomplete`, WEIGHTS.subarray(0, 41_234));
    hub.requests.length = 0;
    const directory = await resolve();
    expect(readFileSync(join(directory, "model.safetensors")).equals(WEIGHTS)).toBe(true);
    expect(weightsRequests()).toEqual(["bytes=41234-"]);
    expect(readdirSync(join(cache(), "blobs")).some((name) => name.endsWith(".incomplete"))).toBe(false);
  });

  test("works with storage that knows no ranges", async () => {
    hub.models.set(MODEL, { ...FILES, "tokenizer.json": text("{}") });
    hub.ignoresRange = true;
    hub.cuts.push(1_500_000);
    const directory = await resolve();
    expect(readFileSync(join(directory, "model.safetensors")).equals(WEIGHTS)).toBe(true);
  });

  test("that brings other bytes than promised is refused, and starts afresh the next time", async () => {
    hub.tampered.set("model.safetensors", new Uint8Array(WEIGHTS.length));
    expect(await refusal()).toContain("model.safetensors: what came has hash");
    hub.tampered.clear();
    const directory = await resolve();
    expect(readFileSync(join(directory, "model.safetensors")).equals(WEIGHTS)).toBe(true);
  });

  test("that never gets anywhere gives up and says so", async () => {
    hub.models.set(MODEL, { ...FILES, "tokenizer.json": text("{}") });
    hub.cuts.push(...new Array<number>(10).fill(0));
    expect(await refusal()).toContain(`cannot download ${MODEL}`);
  });

  test("sends the token to the hub and never to its storage", async () => {
    hub.token = "hf_secret";
    await resolve(MODEL, { HF_TOKEN: "hf_secret" });
    for (const { origin, authorization } of hub.requests) {
      expect(authorization).toBe(origin === "hub" ? "Bearer hf_secret" : null);
    }
    expect(hub.requests.some(({ origin }) => origin === "storage")).toBe(true);
  });

  test("takes the token from the file that other programs write", async () => {
    hub.token = "hf_filed";
    writeFileSync(join(home, "token"), "hf_filed\n");
    await resolve();
  });
});

describe("a model that cannot be had", () => {
  test("for want of a token says which variable to set", async () => {
    hub.token = "hf_secret";
    expect(await refusal()).toContain("private, gated or does not exist (401): set HF_TOKEN");
    expect(await refusal(MODEL, { HF_TOKEN: "hf_other" })).toContain("HF_TOKEN has no access");
  });

  test("because nobody has it says that it is neither there nor a directory", async () => {
    const message = await refusal("kvasir-tests/none");
    expect(message).toContain("no model kvasir-tests/none at main, and there is no such directory");
  });

  test("for want of safetensors weights says so", async () => {
    hub.models.set(MODEL, { "config.json": text("{}"), "pytorch_model.bin": text("x") });
    expect(await refusal()).toContain("has no safetensors weights");
  });

  test("offline comes from the cache, or not at all", async () => {
    expect(await refusal(MODEL, { HF_HUB_OFFLINE: "1" })).toContain("HF_HUB_OFFLINE");
    const directory = await resolve();
    hub.requests.length = 0;
    expect(await resolve(MODEL, { HF_HUB_OFFLINE: "1" })).toBe(directory);
    expect(hub.requests).toHaveLength(0);
  });

  test("because the hub does not answer comes from the cache, and says so", async () => {
    const directory = await resolve();
    const nobody = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
    const HF_ENDPOINT = `http://127.0.0.1:${nobody.port}`;
    nobody.stop(true);
    expect(await resolve(MODEL, { HF_ENDPOINT })).toBe(directory);
    expect(messages.at(-1)).toContain("from the cache");
    const message = await refusal("kvasir-tests/other", { HF_ENDPOINT });
    expect(message).toContain("cannot download kvasir-tests/other");
  });

  test("offline with a shard missing is not taken for whole", async () => {
    const weight_map = { a: "model-00001-of-00002.safetensors", b: "model-00002-of-00002.safetensors" };
    const index = { weight_map };
    hub.models.set(MODEL, {
      "config.json": text("{}"),
      "tokenizer.json": text("{}"),
      "model.safetensors.index.json": text(JSON.stringify(index)),
      "model-00001-of-00002.safetensors": text("1"),
      "model-00002-of-00002.safetensors": text("2"),
    });
    const directory = await resolve();
    expect(await resolve(MODEL, { HF_HUB_OFFLINE: "1" })).toBe(directory);
    rmSync(join(directory, "model-00002-of-00002.safetensors"));
    expect(await refusal(MODEL, { HF_HUB_OFFLINE: "1" })).toContain("is not in the cache");
  });
});
