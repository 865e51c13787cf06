// Request bodies that are too large, too deep, not UTF-8, not JSON, or not what the schema wants.

import { describe, expect, test } from "bun:test";
import { z } from "zod";
import { ApiError } from "../../edge/errors.ts";
import { parseJson, readJson } from "../../edge/json-body.ts";

const anything = z.unknown();

function failureOf(text: string | Uint8Array, schema: z.ZodType = anything): ApiError {
  const bytes = typeof text === "string" ? new TextEncoder().encode(text) : text;
  try {
    parseJson(bytes, schema);
  } catch (error) {
    return error as ApiError;
  }
  throw new Error("it was parsed");
}

function post(body: BodyInit, headers: Record<string, string>): Request {
  return new Request("http://localhost/", { method: "POST", body, headers });
}

describe("parseJson", () => {
  test("refuses invalid JSON, and names what is wrong", () => {
    for (const text of ["{", "{'a': 1}", '{"a": NaN}', '{"a": 1,}', "nul"]) {
      const error = failureOf(text);
      expect(error.status).toBe(400);
      expect(error.message).toStartWith("The body is not valid JSON");
    }
  });

  test("refuses invalid UTF-8", () => {
    const bytes = new Uint8Array([0x22, 0xc3, 0x28, 0x22]);
    expect(failureOf(bytes).message).toBe("The body is not valid UTF-8.");
  });

  test("refuses deep nesting before it is parsed, and counts no brackets in strings", () => {
    expect(failureOf("[".repeat(100_000)).message).toContain("nests deeper than 32 levels");
    expect(failureOf('{"a":'.repeat(33) + "1" + "}".repeat(33)).message).toContain("nests deeper");
    const deepest = "[".repeat(32) + "]".repeat(32);
    expect(() => parseJson(new TextEncoder().encode(deepest), anything)).not.toThrow();
    const text = JSON.stringify(`"\\${"[".repeat(100)}`);
    expect(parseJson(new TextEncoder().encode(text), anything)).toBe(JSON.parse(text));
  });

  test("names the field that the schema refuses", () => {
    const schema = z.object({ list: z.array(z.object({ n: z.number() })) });
    const error = failureOf('{"list":[{"n":1},{"n":"x"}]}', schema);
    expect(error.param).toBe("list.1.n");
    expect(error.message).toStartWith("list.1.n: ");
  });
});

describe("readJson", () => {
  test("refuses a compressed body, and says so", async () => {
    const read = (body: BodyInit, encoding: string) =>
      readJson(post(body, { "content-type": "application/json", "content-encoding": encoding }), anything, 100);
    const error = (await read(Bun.gzipSync("{}"), "gzip").catch((thrown: unknown) => thrown)) as ApiError;
    expect(error.status).toBe(415);
    expect(error.body().error).toMatchObject({ type: "invalid_request_error", code: "unsupported_content_encoding" });
    expect(error.message).toBe('Send the body as it is: Content-Encoding "gzip" is not supported.');
    expect(await read("{}", "Identity")).toEqual({});
  });

  test("takes a body that breaks off for a client that left", async () => {
    const body = new ReadableStream({
      pull: (controller) => controller.error(new DOMException("The connection was closed.", "AbortError")),
    });
    const read = readJson(post(body, { "content-type": "application/json" }), anything, 100);
    expect(((await read.catch((error: unknown) => error)) as ApiError).status).toBe(499);
  });

  test("wants application/json", async () => {
    for (const type of ["text/plain", "application/x-www-form-urlencoded", "application/jsonp"]) {
      const refused = readJson(post("{}", { "content-type": type }), anything, 100);
      expect(((await refused.catch((error: unknown) => error)) as ApiError).status).toBe(415);
    }
    const type = "application/json; charset=utf-8";
    expect(await readJson(post('{"a":1}', { "content-type": type }), anything, 100)).toEqual({ a: 1 });
  });

  test("stops at the limit, whether the length is announced or not", async () => {
    const headers = { "content-type": "application/json" };
    const announced = post("x".repeat(101), { ...headers, "content-length": "101" });
    const chunks = new ReadableStream({
      start(controller) {
        for (let i = 0; i < 3; i++) controller.enqueue(new TextEncoder().encode("x".repeat(50)));
        controller.close();
      },
    });
    for (const request of [announced, post(chunks, headers)]) {
      const refused = readJson(request, anything, 100);
      expect(((await refused.catch((error: unknown) => error)) as ApiError).status).toBe(413);
    }
  });
});
