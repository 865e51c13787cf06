// One part of Kvasir as a process of its own: ready when it says where it listens, stopped by SIGTERM with a
// limit. It leads a process group, so that a Ctrl-C in the terminal reaches the launcher alone, which stops the
// parts in order; its standard input is a pipe whose end tells it that the launcher is gone.

import { type ChildProcess, spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { StartError } from "./start-error.ts";

export interface ServiceOptions {
  readonly name: string;
  /** A TypeScript file; run by the Bun that runs this. */
  readonly program: string;
  readonly arguments: readonly string[];
  readonly environment: Readonly<Record<string, string | undefined>>;
  /** From the end of SIGTERM's patience on it is killed. */
  readonly stopTimeoutMs: number;
  /** Told every line of its standard output. */
  readonly onLine: (line: string) => void;
}

export class Service {
  readonly name: string;
  /** How it ended, such as "exit code 1". */
  readonly exited: Promise<string>;
  readonly #child: ChildProcess;
  readonly #stopTimeoutMs: number;
  readonly #listening = Promise.withResolvers<string>();

  constructor(options: ServiceOptions) {
    this.name = options.name;
    this.#stopTimeoutMs = options.stopTimeoutMs;
    this.#child = spawn(process.execPath, [options.program, ...options.arguments], {
      detached: true,
      stdio: ["pipe", "pipe", "inherit"],
      env: { ...options.environment, KVASIR_PARENT_PIPE: "1" },
    });
    this.exited = new Promise((resolve) => {
      this.#child.once("error", (error) => resolve(error.message));
      this.#child.once("exit", (code, signal) => resolve(signal ?? `exit code ${code}`));
    });
    const listening = new RegExp(`^${options.name} listening on (\\S+)$`);
    createInterface({ input: this.#child.stdout! }).on("line", (line) => {
      const url = listening.exec(line)?.[1];
      if (url !== undefined) this.#listening.resolve(url);
      options.onLine(line);
    });
  }

  get pid(): number | undefined {
    return this.#child.pid;
  }

  /** The URL at which it listens. Throws StartError when it ends instead, and when the signal comes first. */
  async ready(signal: AbortSignal): Promise<string> {
    const ended = this.exited.then((how) => {
      throw new StartError(`the ${this.name} did not start (${how}): see above`);
    });
    const stopped = new Promise<never>((_, reject) => {
      signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    });
    signal.throwIfAborted();
    return await Promise.race([this.#listening.promise, ended, stopped]);
  }

  /** Resolves when the process is gone. `atOnce` takes the patience away. */
  async stop(atOnce: AbortSignal): Promise<void> {
    this.#child.kill("SIGTERM");
    const limit = AbortSignal.any([atOnce, AbortSignal.timeout(this.#stopTimeoutMs)]);
    const kill = () => this.#child.kill("SIGKILL");
    if (limit.aborted) kill();
    limit.addEventListener("abort", kill, { once: true });
    await this.exited;
    limit.removeEventListener("abort", kill);
  }
}
