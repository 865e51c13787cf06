// A real sidecar as a process of its own, with the bundled model on the CPU library and small cache tiers.

import { FAKE_SECRET } from "./fake-sidecar.ts";

const ROOT = new URL("../..", import.meta.url).pathname;
export const MODEL = "kvasir-15m-chat";

const FLAGS = ["--backend", "cpu", "--gpu-memory", "256M", "--host-memory", "128M", "--disk", "256M"];

export interface SidecarProcess {
  readonly url: string;
  /** What it has written to stdout so far. */
  output(): string;
  /** As `kill -9` does; resolves when it has gone. */
  kill(): Promise<void>;
  /** By SIGTERM; returns its exit code. */
  stop(): Promise<number>;
}

export interface SidecarProcessOptions {
  /** Data directory; the same one again for a restart. */
  readonly data: string;
  /** 0: any free one. */
  readonly port?: number;
  readonly flags?: readonly string[];
  /** Command that runs the command behind it, as `nice` does. */
  readonly wrapper?: readonly string[];
}

/** Resolves when it listens; throws what it wrote when it ends before that. */
export async function startSidecarProcess(options: SidecarProcessOptions): Promise<SidecarProcess> {
  const { data, port = 0, flags = [], wrapper = [] } = options;
  const args = ["--data", data, "--port", String(port), ...FLAGS, ...flags];
  const child = Bun.spawn([...wrapper, process.execPath, "run", "sidecar/main.ts", ...args], {
    cwd: ROOT,
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    env: { ...process.env, KVASIR_SIDECAR_SECRET: FAKE_SECRET },
  });
  const end = async (signal: "SIGTERM" | "SIGKILL") => {
    child.kill(signal);
    return await child.exited;
  };
  let text = "";
  const url = await listening(child.stdout, (more) => (text += more));
  if (url === null) throw new Error(`the sidecar ended: ${await new Response(child.stderr).text()}`);
  return { url, output: () => text, stop: () => end("SIGTERM"), kill: async () => void (await end("SIGKILL")) };
}

/**
 * Reads on to the end, so that the pipe never fills. `collect` takes what comes and returns all of it. Null when it
 * ends before it listens.
 */
function listening(output: ReadableStream<Uint8Array>, collect: (more: string) => string): Promise<string | null> {
  const { promise, resolve } = Promise.withResolvers<string | null>();
  const read = async () => {
    const decoder = new TextDecoder();
    for await (const chunk of output) {
      const url = /sidecar listening on (\S+)\n/.exec(collect(decoder.decode(chunk, { stream: true })))?.[1];
      if (url !== undefined) resolve(url);
    }
    resolve(null);
  };
  void read();
  return promise;
}
