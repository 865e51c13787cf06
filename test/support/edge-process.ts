// The edge as people run it: a process of its own, on Bun or on Deno.

import type { Subprocess } from "bun";
import { readFileSync } from "node:fs";
import { FAKE_SECRET } from "./fake-sidecar.ts";

const ROOT = new URL("../..", import.meta.url).pathname;
const BIN = `${ROOT}node_modules/.bin`;
const { tasks } = JSON.parse(readFileSync(`${ROOT}deno.json`, "utf8")) as { tasks: { edge: { command: string } } };

export const RUNTIMES = ["bun", "deno"] as const;
export type Runtime = (typeof RUNTIMES)[number];

/** Flags go behind it. */
const COMMAND: Readonly<Record<Runtime, string[]>> = {
  bun: [process.execPath, "run", "edge/main.ts"],
  deno: ["sh", "-c", `exec ${tasks.edge.command} "$@"`, "edge"],
};

export type EdgeProcess = {
  url: string;
  process: Subprocess<"ignore", "pipe", "pipe">;
  /** Ends it by SIGTERM; returns its exit code. */
  stop(): Promise<number>;
};

/** With a terminal for its input and output. Returns what it writes, up to the end or to a text that ends it. */
export async function runEdgeInTerminal(runtime: Runtime, flags: string[], cutAt: string): Promise<string> {
  let output = "";
  const decoder = new TextDecoder();
  const child = Bun.spawn([...COMMAND[runtime], ...flags], {
    cwd: ROOT,
    env: environment(),
    terminal: {
      data: (_, chunk) => {
        output += decoder.decode(chunk, { stream: true });
        if (output.includes(cutAt)) child.kill("SIGKILL");
      },
    },
  });
  await child.exited;
  child.terminal?.close();
  return output;
}

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
      ...environment(),
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

function environment(): Record<string, string | undefined> {
  return { ...process.env, PATH: `${BIN}:${process.env["PATH"]}` };
}

async function stop(child: EdgeProcess["process"]): Promise<number> {
  child.kill("SIGTERM");
  return await child.exited;
}
