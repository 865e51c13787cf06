// A real sidecar process and somebody who talks to it over its protocol: greedy answers, and what they were made from.

import { expect } from "bun:test";
import { SidecarClient } from "../../edge/sidecar-client.ts";
import type { ChatMessage, Done } from "../../sidecar/protocol.ts";
import { FAKE_SECRET } from "./fake-sidecar.ts";
import { MODEL, type SidecarProcess, type SidecarProcessOptions, startSidecarProcess } from "./sidecar-process.ts";
import { submitRequest } from "./submit-request.ts";

export interface TalkerAnswer {
  readonly text: string;
  readonly done: Done;
  /** Tokens of the prompt that were cached in any tier. */
  readonly cached: number;
}

const ANSWER_TOKENS = 40;
const quietLog = { debug() {}, info() {}, warn() {}, error() {} };

export class Talker {
  static readonly #running = new Set<Talker>();

  private constructor(
    readonly process: SidecarProcess,
    readonly client: SidecarClient,
  ) {}

  static async start(options: SidecarProcessOptions): Promise<Talker> {
    const process = await startSidecarProcess(options);
    const ready = Promise.withResolvers<void>();
    const address = { url: process.url, secret: FAKE_SECRET, edgeName: "test", log: quietLog };
    const talker = new Talker(process, new SidecarClient({ ...address, onChange: ready.resolve }));
    Talker.#running.add(talker);
    await ready.promise;
    return talker;
  }

  /** What a failed test has left running. */
  static async killAll(): Promise<void> {
    for (const talker of Talker.#running) await talker.kill();
  }

  submit(messages: ChatMessage[], salt = new Uint8Array(32), maxTokens = ANSWER_TOKENS) {
    return this.client.submit(submitRequest({ model: MODEL, salt, messages, sampling: { temperature: 0, maxTokens } }));
  }

  /** One greedy answer. */
  async ask(messages: ChatMessage[], salt?: Uint8Array<ArrayBuffer>): Promise<TalkerAnswer> {
    const stream = this.submit(messages, salt);
    let text = "";
    for (;;) {
      const event = await stream.next();
      if (event.type === "done") {
        const { gpu, host, disk } = event.done.usage.cachedTokens;
        return { text, done: event.done, cached: gpu + host + disk };
      }
      for (const delta of event.deltas) text += delta.text;
    }
  }

  /** An answer that must be what an account of its own gets, which finds nothing in the cache. */
  async askChecked(messages: ChatMessage[]): Promise<TalkerAnswer> {
    const answer = await this.ask(messages);
    const alone = await this.ask(messages, crypto.getRandomValues(new Uint8Array(32)));
    expect(alone.cached).toBe(0);
    expect(answer.text).toBe(alone.text);
    return answer;
  }

  async stats(): Promise<Record<string, number>> {
    return (await this.client.stats()) as Record<string, number>;
  }

  /** Nothing is asked any more until all that is cached is on disk. */
  async quiet(): Promise<void> {
    let stats = await this.stats();
    while (stats["movesInFlight"]! > 0 || stats["cachedBlocks"]! > stats["diskBlocksUsed"]!) stats = await this.stats();
  }

  async kill(): Promise<void> {
    this.#leave();
    await this.process.kill();
  }

  async stop(): Promise<void> {
    this.#leave();
    expect(await this.process.stop()).toBe(0);
  }

  #leave(): void {
    Talker.#running.delete(this);
    this.client.close();
  }
}
