// A real sidecar for benches, asked directly over its protocol.

import { mkdtempSync, rmSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { chatRequest, submitRequest } from "../../edge/chat-request.ts";
import { SidecarClient } from "../../edge/sidecar-client.ts";
import type { Done } from "../../sidecar/protocol.ts";
import { FAKE_SECRET } from "./fake-sidecar.ts";
import { type SidecarProcess, startSidecarProcess } from "./sidecar-process.ts";

const quiet = { debug() {}, info() {}, warn() {}, error() {} };

export type BenchMessage = { role: string; content: string };

export class BenchSidecar {
  private constructor(
    readonly process: SidecarProcess,
    readonly client: SidecarClient,
    readonly data: string,
  ) {}

  /** `flags` as on the sidecar's command line. */
  static async start(flags: readonly string[]): Promise<BenchSidecar> {
    const data = mkdtempSync(join(tmpdir(), "kvasir-bench-"));
    const process = await startSidecarProcess({ data, flags });
    const ready = Promise.withResolvers<void>();
    const options = { url: process.url, secret: FAKE_SECRET, edgeName: "bench", log: quiet };
    const client = new SidecarClient({ ...options, onChange: ready.resolve });
    await ready.promise;
    return new BenchSidecar(process, client, data);
  }

  get model(): string {
    return this.client.model!.id;
  }

  /** Where and what is measured. */
  get description(): string {
    const { backend, id, maxModelLen } = this.client.model!;
    return `${id} (${maxModelLen} tokens) on ${backend}; ${cpus().length} cores, ${cpus()[0]?.model}`;
  }

  /** One answer; who has another salt finds nothing of others in the cache. */
  async ask(messages: BenchMessage[], salt: Uint8Array, fields: object = {}): Promise<{ text: string; done: Done }> {
    const body = chatRequest.parse({ model: this.model, messages, temperature: 0, ...fields });
    const limits = { salt: new Uint8Array(salt), maxModelLen: this.client.model!.maxModelLen, deadlineMs: 600_000 };
    const stream = this.client.submit(submitRequest(body, limits));
    let text = "";
    for (;;) {
      const event = await stream.next();
      if (event.type === "done") return { text, done: event.done };
      for (const delta of event.deltas) text += delta.text;
    }
  }

  async stop(): Promise<void> {
    this.client.close();
    await this.process.stop();
    rmSync(this.data, { recursive: true });
  }
}

export function newSalt(): Uint8Array {
  return crypto.getRandomValues(new Uint8Array(32));
}
