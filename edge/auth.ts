// Who asks. Until there are keys of accounts, everybody is the default account; where KVASIR_API_KEY is
// set, clients must know it.

import type { MiddlewareHandler } from "hono";
import type { Database } from "../db/client.ts";
import { DEFAULT_ACCOUNT } from "../db/migrate.ts";
import type { Account } from "../db/queries.ts";
import { findAccount } from "../db/queries.ts";
import { ApiError } from "./errors.ts";

/** The account of every request, with its salt. Migrations have made it. */
export async function loadDefaultAccount(database: Database): Promise<Account> {
  const account = await database.run((orm) => findAccount(orm, DEFAULT_ACCOUNT));
  if (account === null) throw new Error(`the database has no account "${DEFAULT_ACCOUNT}"`);
  return account;
}

/** Wants `Authorization: Bearer KEY`, the scheme in any case; lets everybody in when `apiKey` is null. */
export function requireApiKey(apiKey: string | null): MiddlewareHandler {
  return async (c, next) => {
    const given = /^Bearer +(.+)$/i.exec(c.req.header("authorization") ?? "")?.[1] ?? null;
    if (apiKey !== null && !(given !== null && (await isSame(given, apiKey)))) {
      const message = given === null ? "Send the API key as Authorization: Bearer KEY." : "The API key is wrong.";
      throw new ApiError(401, "invalid_api_key", message);
    }
    await next();
  };
}

/** Compares digests, so that the time taken tells nothing about the key. */
async function isSame(a: string, b: string): Promise<boolean> {
  const digest = async (text: string) =>
    new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text)));
  const [x, y] = await Promise.all([digest(a), digest(b)]);
  return x.every((byte, i) => byte === y[i]);
}
