// The edge as people run it: a process of its own, on Bun or on Deno.

import type { Subprocess } from "bun";
import { FAKE_SECRET } from "./fake-sidecar.ts";

const ROOT = new URL("../..", import.meta.url).pathname;
const DENO = `${ROOT}node_modules/.bin/deno`;
const DENO_PERMISSIONS = ["--allow-net", "--allow-env", "--allow-sys", "--allow-read=."];

export const RUNTIMES = ["bun", "deno"] as const;
export type Runtime = (typeof RUNTIMES)[number];

const COMMAND: Readonly<Record<Runtime, string[]>> = {
  bun: [process.execPath, "run", "edge/main.ts"],
  deno: [DENO, "run", "--unstable-no-legacy-abort", ...DENO_PERMISSIONS, "edge/main.ts"],
};

export type EdgeProcess = {
  url: string;
  process: Subprocess<"ignore", "pipe", "pipe">;
  /** Ends it by SIGTERM; returns its exit code. */
  stop(): Promise<number>;
};

/** Starts the process without waiting for anything. */
export function spawnEdge(
  runtime: Runtime,
  databaseUrl: string,
  sidecars: readonly { readonly url: string }[],
  flags: string[] = [],
): EdgeProcess["process"] {
  return Bun.spawn([...COMMAND[runtime], "--port", "0", ...flags], {
    cwd: ROOT,
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    env: {
      ...process.env,
      DATABASE_URL: databaseUrl,
      KVASIR_SIDECARS: sidecars.map((sidecar) => sidecar.url).join(","),
      KVASIR_SIDECAR_SECRET: FAKE_SECRET,
      NO_COLOR: "1",
    },
  });
}

/** Resolves when the edge listens; throws what it wrote when it ends before that. */
export async function startEdgeProcess(
  ...args: Parameters<typeof spawnEdge>
): Promise<EdgeProcess> {
  const child = spawnEdge(...args);
  let output = "";
  const decoder = new TextDecoder();
  for await (const chunk of child.stdout) {
    output += decoder.decode(chunk, { stream: true });
    const url = /edge listening on (\S+)\n/.exec(output)?.[1];
    if (url !== undefined) return { url, process: child, stop: () => stop(child) };
  }
  throw new Error(`the edge ended: ${await new Response(child.stderr).text()}`);
}

async function stop(child: EdgeProcess["process"]): Promise<number> {
  child.kill("SIGTERM");
  return await child.exited;
}
