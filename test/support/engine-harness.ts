// An Engine on a fake device, turned by hand: what each choice was answered, and whether anything was left behind.

import { expect } from "bun:test";
import { Engine } from "../../sidecar/engine/engine.ts";
import type { EngineEvent, EngineRequest, FailEvent, FinishEvent } from "../../sidecar/engine/request.ts";
import type { BlockHasher } from "../../sidecar/kvcache/block-hash.ts";
import { KvCache } from "../../sidecar/kvcache/kv-cache.ts";
import { FAKE_EOS, FakeRunner, GREEDY } from "./fake-runner.ts";

export interface HarnessOptions {
  readonly blockTokens?: number;
  readonly gpuBlocks?: number;
  readonly maxBatchTokens?: number;
  readonly maxSequences?: number;
  readonly maxWaiting?: number;
  readonly maxBiases?: number;
  readonly maxModelLen?: number;
  readonly hasher?: BlockHasher;
}

/** All that happened to one choice. */
export interface ChoiceLog {
  readonly tokens: number[];
  finish: FinishEvent | null;
}

export class EngineHarness {
  readonly runner: FakeRunner;
  readonly cache: KvCache;
  readonly engine: Engine;
  readonly choices = new Map<string, ChoiceLog>();
  readonly fails = new Map<number, FailEvent>();
  nowMs = 1000;
  #nextId = 1;

  constructor(options: HarnessOptions = {}) {
    const { blockTokens = 8, gpuBlocks = 64, maxBatchTokens = 16, maxSequences = 4 } = options;
    const { maxWaiting = 1000, maxBiases = 16, maxModelLen = 256 } = options;
    const maxBlocksPerSequence = Math.ceil((maxModelLen + 1) / blockTokens);
    const limits = { maxRows: maxBatchTokens, maxSequences, maxBiases, maxBlocksPerSequence };
    this.runner = new FakeRunner({ blockCount: gpuBlocks, blockTokens, limits });
    const hasher = options.hasher === undefined ? {} : { hasher: options.hasher };
    this.cache = new KvCache(this.runner, { blockTokens, gpuBlocks, fingerprint: "fake", ...hasher });
    const eosTokens = new Set([FAKE_EOS]);
    const engineOptions = { maxBatchTokens, maxSequences, maxBiases, maxWaiting, eosTokens };
    this.engine = new Engine(this.cache, this.runner, engineOptions, () => this.nowMs);
  }

  /** Returns the request's id. */
  submit(tokens: readonly number[], changes: Partial<EngineRequest> = {}): number {
    const id = this.#nextId++;
    this.engine.submit({
      id,
      tokens: Int32Array.from(tokens),
      salt: new Uint8Array(32),
      sampling: GREEDY,
      choiceCount: 1,
      maxTokens: 12,
      receivedAtMs: this.nowMs,
      deadlineAtMs: this.nowMs + 1e9,
      ...changes,
    });
    return id;
  }

  /** One turn of the loop; the device does not move. */
  step(): readonly EngineEvent[] {
    const events = this.engine.step();
    for (const event of events) this.#note(event);
    return events;
  }

  /** Turns engine and device until nothing is left to do. */
  runToEnd(betweenTurns: () => void = () => {}): void {
    for (let turn = 0; !this.engine.isIdle; turn++) {
      expect(turn, "the engine does not come to an end").toBeLessThan(100_000);
      this.step();
      this.runner.finishStep();
      betweenTurns();
    }
  }

  answer(request: number, choice = 0): ChoiceLog {
    return this.choices.get(`${request}/${choice}`) ?? { tokens: [], finish: null };
  }

  /** Everything ended and everything was given back. */
  expectNothingLeft(): void {
    expect(this.engine.isIdle).toBe(true);
    expect(this.engine.stats().runningSequences).toBe(0);
    expect(this.engine.stats().waitingSequences).toBe(0);
    expect(this.cache.availableBlocks).toBe(this.cache.blockCount);
    this.cache.checkInvariants();
  }

  #note(event: EngineEvent): void {
    if (event.type === "fail") {
      expect(this.fails.has(event.request), "a request fails once").toBe(false);
      this.fails.set(event.request, event);
      return;
    }
    const key = `${event.request}/${event.choice}`;
    const log = this.choices.get(key) ?? { tokens: [], finish: null };
    this.choices.set(key, log);
    expect(log.finish, "nothing follows a finish").toBe(null);
    expect(this.fails.has(event.request), "nothing follows a failure").toBe(false);
    if (event.type === "token") log.tokens.push(event.token);
    else log.finish = event;
  }
}
