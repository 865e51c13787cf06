// What a person sees when all is up: where the API is, a line to try it, how to look into the database.

import { join } from "node:path";
import type { LauncherConfig } from "./config.ts";
import { reachable } from "./edge-endpoint.ts";

/** edgeUrl: as the edge said it. */
export function describeReady(config: LauncherConfig, edgeUrl: string, models: readonly string[]): string {
  const api = `${reachable(edgeUrl)}/v1`;
  const body = JSON.stringify({
    model: models[0] ?? "MODEL",
    messages: [{ role: "user", content: "Hello!" }],
  });
  const key = config.needsApiKey ? ' -H "authorization: Bearer $KVASIR_API_KEY"' : "";
  const database =
    config.databaseUrl === null
      ? `psql "$(cat ${quote(join(config.dataDirectory, "postgres", "url"))})"`
      : `psql ${quote(withoutPassword(config.databaseUrl))}`;
  return [
    "",
    "Kvasir is ready.",
    `  API       ${api}`,
    `  model     ${models.join(", ")}`,
    `  try it    curl -s ${api}/chat/completions -H "content-type: application/json"${key} -d ${quote(body)}`,
    `  database  ${database}`,
    `  data      ${config.dataDirectory}`,
    "  stop      Ctrl-C",
    "",
  ].join("\n");
}

/** For a shell; plain words stay as they are. */
function quote(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`;
}

function withoutPassword(url: string): string {
  return url.replace(/(\/\/[^:/@]*):[^@]*@/, "$1@");
}
