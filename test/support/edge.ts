// An edge inside the test's process, and the few requests that most tests send.

import type { EdgeConfig } from "../../edge/config.ts";
import { createApp } from "../../edge/app.ts";
import { readEdgeConfig } from "../../edge/config.ts";
import { startServices } from "../../edge/start-services.ts";
import type { FakeSidecar } from "./fake-sidecar.ts";
import { FAKE_MODEL, FAKE_SECRET } from "./fake-sidecar.ts";

export type TestEdge = Awaited<ReturnType<typeof startEdge>>;

/** `flags` as on the command line, `env` as in the environment. */
export async function startEdge(
  databaseUrl: string,
  sidecars: FakeSidecar[],
  flags: string[] = [],
  env: Record<string, string> = {},
) {
  const config = testConfig(databaseUrl, sidecars, flags, env);
  const { services, pendingDeletes, close } = await startServices(config);
  const app = createApp(services, pendingDeletes);
  const request = async (path: string, init: RequestInit = {}): Promise<Response> => {
    const headers = { host: "localhost:8787", ...(init.headers as Record<string, string>) };
    return await app.fetch(new Request(`http://localhost:8787${path}`, { ...init, headers }));
  };
  const post = (path: string, body: unknown, init: RequestInit = {}) =>
    request(path, {
      method: "POST",
      body: typeof body === "string" ? body : JSON.stringify(body),
      ...init,
      headers: { "content-type": "application/json", ...(init.headers as Record<string, string>) },
    });
  const chat = (body: object, init?: RequestInit) =>
    post("/v1/chat/completions", { ...user("hello big world"), ...body }, init);
  return { app, services, request, post, chat, close };
}

export function testConfig(
  databaseUrl: string,
  sidecars: FakeSidecar[],
  flags: string[] = [],
  env: Record<string, string> = {},
): EdgeConfig {
  const urls = sidecars.map((sidecar) => sidecar.url).join(",");
  const argv = ["--sidecar", urls, "--log-level", "silent", ...flags];
  return readEdgeConfig(argv, { KVASIR_SIDECAR_SECRET: FAKE_SECRET, DATABASE_URL: databaseUrl, ...env })!;
}

/** The body of a chat with one user message. */
export function user(content: string) {
  return { model: FAKE_MODEL, messages: [{ role: "user", content }] };
}

/** The data of each server-sent event; comments are left out. */
export function parseEvents(text: string): string[] {
  return text
    .split("\n\n")
    .filter((block) => block.startsWith("data: "))
    .map((block) => block.slice("data: ".length));
}

/** Reads a stream to its end. */
export async function readEvents(response: Response): Promise<string[]> {
  return parseEvents(await response.text());
}

export type ErrorAnswer = { error: { message: string; type: string; param: string | null; code: string } };

export async function errorOf(response: Response): Promise<ErrorAnswer["error"] & { status: number }> {
  const { error } = (await response.json()) as ErrorAnswer;
  return { ...error, status: response.status };
}
