// Request bodies: bounded in bytes and in depth, valid UTF-8, valid JSON, then parsed by a zod schema.
// Each refusal says what was wrong, in OpenAI's error object.

import type { z } from "zod";
import { LIMITS } from "./config.ts";
import { ApiError, clientLeft, invalidRequest } from "./errors.ts";

/** The body as `schema` parses it; an empty body counts as {}. Throws ApiError. */
export async function readJson<Schema extends z.ZodType>(
  request: Request,
  schema: Schema,
  limitBytes: number,
): Promise<z.output<Schema>> {
  const type = request.headers.get("content-type") ?? "";
  const bytes = await readBytes(request, limitBytes);
  const hasJsonType = /^application\/([\w.+-]+\+)?json\s*(;|$)/i.test(type);
  if (!hasJsonType && !(bytes.length === 0 && type === "")) {
    const message = `Send the body as application/json, not "${type}".`;
    throw new ApiError(415, "unsupported_media_type", message);
  }
  const encoding = request.headers.get("content-encoding") ?? "identity";
  if (!/^(identity)?$/i.test(encoding.trim())) {
    const message = `Send the body as it is: Content-Encoding "${encoding}" is not supported.`;
    throw new ApiError(415, "unsupported_content_encoding", message);
  }
  return parseJson(bytes, schema);
}

/** Throws ApiError. */
export function parseJson<Schema extends z.ZodType>(
  bytes: Uint8Array,
  schema: Schema,
): z.output<Schema> {
  if (depthOf(bytes, LIMITS.jsonDepth) > LIMITS.jsonDepth) {
    throw invalidRequest(`The body nests deeper than ${LIMITS.jsonDepth} levels.`);
  }
  let value: unknown;
  try {
    value = JSON.parse(bytes.length === 0 ? "{}" : decodeUtf8(bytes));
  } catch (error) {
    if (error instanceof ApiError) throw error;
    throw invalidRequest(`The body is not valid JSON: ${(error as Error).message}`);
  }
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  const param = issue.path.length === 0 ? null : issue.path.join(".");
  throw invalidRequest(param === null ? issue.message : `${param}: ${issue.message}`, param);
}

async function readBytes(request: Request, limitBytes: number): Promise<Uint8Array> {
  const tooLarge = new ApiError(413, "body_too_large", `The body is longer than ${limitBytes} bytes.`);
  if (Number(request.headers.get("content-length") ?? 0) > limitBytes) throw tooLarge;
  if (request.body === null) return new Uint8Array(0);
  const reader = request.body.getReader();
  let isLate = false;
  const timer = setTimeout(() => {
    isLate = true;
    void reader.cancel();
  }, LIMITS.bodyTimeoutMs);
  const chunks: Uint8Array[] = [];
  let length = 0;
  try {
    for (let part = await nextPart(reader); !part.done; part = await nextPart(reader)) {
      length += part.value.length;
      if (length > limitBytes) throw tooLarge;
      chunks.push(part.value);
    }
  } finally {
    clearTimeout(timer);
  }
  if (isLate) {
    const message = `The body took longer than ${LIMITS.bodyTimeoutMs} ms to arrive.`;
    throw new ApiError(408, "body_timeout", message);
  }
  return chunks.length === 1 ? chunks[0]! : concatenate(chunks, length);
}

/** A body that cannot be read to its end is one whose client left; each runtime has its own error for that. */
async function nextPart(reader: ReadableStreamDefaultReader<Uint8Array>) {
  try {
    return await reader.read();
  } catch (error) {
    throw clientLeft(error);
  }
}

function concatenate(chunks: Uint8Array[], length: number): Uint8Array {
  const bytes = new Uint8Array(length);
  let offset = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, offset);
    offset += chunk.length;
  }
  return bytes;
}

function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw invalidRequest("The body is not valid UTF-8.");
  }
}

const [QUOTE, BACKSLASH] = [0x22, 0x5c];
const [OPEN_BRACKET, CLOSE_BRACKET, OPEN_BRACE, CLOSE_BRACE] = [0x5b, 0x5d, 0x7b, 0x7d];

/** Nesting of JSON text, counted before it is parsed; stops counting beyond `max`. */
function depthOf(bytes: Uint8Array, max: number): number {
  let depth = 0;
  let deepest = 0;
  let isInString = false;
  for (let i = 0; i < bytes.length && deepest <= max; i++) {
    const byte = bytes[i]!;
    if (isInString) {
      if (byte === BACKSLASH) i++;
      else if (byte === QUOTE) isInString = false;
    } else if (byte === QUOTE) {
      isInString = true;
    } else if (byte === OPEN_BRACKET || byte === OPEN_BRACE) {
      deepest = Math.max(deepest, ++depth);
    } else if (byte === CLOSE_BRACKET || byte === CLOSE_BRACE) {
      depth--;
    }
  }
  return deepest;
}
