// Errors as clients see them: OpenAI's error object, with a status and a code for each cause. What is
// not an ApiError is a fault of ours: logged, and told to the client as "internal".

import type { Context } from "hono";
import type { ContentfulStatusCode } from "hono/utils/http-status";
import type { ErrorCode } from "../sidecar/protocol.ts";

/** Body of an error answer, and of an error event in a stream. */
export type ErrorBody = {
  error: { message: string; type: string; param: string | null; code: string };
};

/** 499, which is nginx's and in no RFC: the client left before its answer. */
export type ApiStatus = 400 | 401 | 403 | 404 | 408 | 409 | 413 | 415 | 429 | 499 | 500 | 503 | 504;

export class ApiError extends Error {
  override name = "ApiError";
  readonly param: string | null;
  readonly retryAfterS: number | null;

  constructor(
    readonly status: ApiStatus,
    readonly code: string,
    message: string,
    options: { param?: string | null; retryAfterS?: number | null; cause?: unknown } = {},
  ) {
    super(message, { cause: options.cause });
    this.param = options.param ?? null;
    this.retryAfterS = options.retryAfterS ?? null;
  }

  body(): ErrorBody {
    const { message, param, code } = this;
    return { error: { message, type: errorType(this.status), param, code } };
  }
}

/** The error as the answer to a request. */
export function errorResponse(c: Context, error: ApiError): Response {
  if (error.retryAfterS !== null) c.header("retry-after", String(Math.ceil(error.retryAfterS)));
  return c.json(error.body(), error.status as ContentfulStatusCode);
}

export function invalidRequest(message: string, param: string | null = null): ApiError {
  return new ApiError(400, "invalid_request", message, { param });
}

export function databaseUnavailable(cause: unknown): ApiError {
  const message = "The database is not available, so conversations cannot be read or stored now. Try again.";
  return new ApiError(503, "database_unavailable", message, { retryAfterS: 1, cause });
}

/** Nobody reads this; it is counted. */
export function clientLeft(cause?: unknown): ApiError {
  return new ApiError(499, "aborted", "The client left.", { cause });
}

const SIDECAR_STATUS: Readonly<Record<ErrorCode, ApiStatus>> = {
  invalid_request: 400,
  context_length_exceeded: 400,
  conversation_deleted: 404,
  queue_full: 429,
  deadline_exceeded: 504,
  shutting_down: 503,
  internal: 500,
};

/** An error frame of a sidecar. */
export function sidecarError(
  code: ErrorCode,
  message: string,
  retryAfterS: number | null,
): ApiError {
  const status = SIDECAR_STATUS[code];
  const param = code === "context_length_exceeded" ? "messages" : null;
  const retry = status === 429 || status === 503 ? (retryAfterS ?? 1) : retryAfterS;
  return new ApiError(status, code, message, { param, retryAfterS: retry });
}

/** The connection broke while the sidecar was answering. */
export function sidecarLost(reason: string): ApiError {
  const message = `The connection to the sidecar was lost: ${reason}. Try again.`;
  return new ApiError(503, "sidecar_lost", message, { retryAfterS: 1 });
}

/** For whatever was thrown: an ApiError as it is, anything else as a fault of ours. */
export function toApiError(error: unknown): ApiError {
  if (error instanceof ApiError) return error;
  return new ApiError(500, "internal", "Internal error; the server's log has the details.", {
    cause: error,
  });
}

function errorType(status: ApiStatus): string {
  if (status === 401) return "authentication_error";
  if (status === 429) return "rate_limit_error";
  return status >= 500 ? "server_error" : "invalid_request_error";
}
