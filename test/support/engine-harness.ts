// An Engine on a fake device, turned by hand, with as many tiers below the gpu as the test wants: what each choice was
// answered, and whether anything was left behind.

import { expect } from "bun:test";
import { Engine } from "../../sidecar/engine/engine.ts";
import type { EngineEvent, EngineRequest, FailEvent, FinishEvent } from "../../sidecar/engine/request.ts";
import type { BackgroundOptions } from "../../sidecar/kvcache/background.ts";
import type { BlockHasher } from "../../sidecar/kvcache/block-hash.ts";
import { adoptDisk, adoptHost } from "../../sidecar/kvcache/adopt-blocks.ts";
import { HEADER_BYTES } from "../../sidecar/kvcache/block-header.ts";
import { DiskStore } from "../../sidecar/kvcache/disk-store.ts";
import { DiskTier } from "../../sidecar/kvcache/disk-tier.ts";
import { HostTier } from "../../sidecar/kvcache/host-tier.ts";
import { KvCache, type KvCacheOptions } from "../../sidecar/kvcache/kv-cache.ts";
import type { LowerTiers } from "../../sidecar/kvcache/residency.ts";
import { DiskMedium } from "./disk-medium.ts";
import { FakeDevice, STREAMS } from "./fake-device.ts";
import { FAKE_EOS, FakeRunner, GREEDY, ReferenceView, referenceAnswer } from "./fake-runner.ts";
import { FaultyDisk } from "./faulty-disk.ts";
import { SeededRandom } from "./seeded-random.ts";

export interface HarnessOptions {
  readonly blockTokens?: number;
  readonly gpuBlocks?: number;
  readonly hostSlots?: number;
  readonly diskSlots?: number;
  readonly layers?: number;
  readonly maxBatchTokens?: number;
  readonly maxSequences?: number;
  readonly maxWaiting?: number;
  readonly maxBiases?: number;
  readonly maxModelLen?: number;
  readonly queueCapacity?: number;
  readonly loadAheadBlocks?: number;
  readonly hasher?: BlockHasher;
  readonly fingerprint?: string;
  readonly cache?: Partial<Omit<KvCacheOptions, "background">>;
  readonly background?: Partial<BackgroundOptions>;
  /** For the disk, and for the order in which streams move. */
  readonly random?: SeededRandom;
  readonly medium?: DiskMedium;
  /** Host memory that outlives the harness: slots and headers. */
  readonly survivor?: HostSurvivor;
}

/** What an earlier process left in shared memory. */
export interface HostSurvivor {
  readonly slots: Uint8Array;
  readonly headers: Uint8Array;
}

/** All that happened to one choice. */
export interface ChoiceLog {
  readonly tokens: number[];
  finish: FinishEvent | null;
}

export class EngineHarness {
  readonly device: FakeDevice;
  readonly runner: FakeRunner;
  readonly cache: KvCache;
  readonly engine: Engine;
  readonly disk: FaultyDisk | null = null;
  readonly medium: DiskMedium;
  readonly headers: Uint8Array;
  readonly random: SeededRandom;
  readonly choices = new Map<string, ChoiceLog>();
  readonly fails = new Map<number, FailEvent>();
  /** Blocks that held requests said they would leave. */
  readonly announced: string[] = [];
  /** What the tiers had to say. */
  readonly messages: string[] = [];
  nowMs = 1000;
  /** Called before each turn. */
  onTurn: () => void = () => {};
  #nextId = 1;

  constructor(readonly options: HarnessOptions = {}) {
    const { blockTokens = 8, gpuBlocks = 64, maxBatchTokens = 16, maxSequences = 4, layers = 2 } = options;
    const { maxWaiting = 1000, maxBiases = 16, maxModelLen = 256, hostSlots = 0, diskSlots = 0 } = options;
    const maxBlocksPerSequence = Math.ceil((maxModelLen + 1) / blockTokens);
    const limits = { maxRows: maxBatchTokens, maxSequences, maxBiases, maxBlocksPerSequence };
    const { queueCapacity = 1000 } = options;
    this.random = options.random ?? new SeededRandom(1);
    this.medium = options.medium ?? new DiskMedium();
    this.headers = new Uint8Array(Math.max(1, hostSlots) * HEADER_BYTES);
    this.device = new FakeDevice({ blockCount: gpuBlocks, blockTokens, layers, hostSlots, queueCapacity });
    this.runner = new FakeRunner(this.device, limits);
    if (diskSlots > 0) {
      const { random, medium } = this;
      this.disk = new FaultyDisk({ random, medium, memory: this.device.memory.view, queueCapacity: 16 });
    }
    const hasher = options.hasher === undefined ? {} : { hasher: options.hasher };
    this.cache = new KvCache(
      this.device,
      {
        blockTokens,
        blockBytes: this.device.slotBytes,
        layers,
        gpuBlocks,
        fingerprint: options.fingerprint ?? "fake",
        maxTokens: maxModelLen,
        keepBlocks: 1,
        truncationRatio: 0.5,
        policy: "scheduler-aware",
        windowBlocks: hostSlots + diskSlots,
        isExclusive: false,
        recompute: "never",
        preloadLayers: null,
        maxLoadStallMs: 1,
        background: {
          admission: "idle",
          idleMs: 5,
          hostMarks: { lowBlocks: 1, highBlocks: 2 },
          gpuMarks: { lowBlocks: 1, highBlocks: 2 },
          maxReads: 4,
          maxWrites: 4,
          ...options.background,
        },
        ...hasher,
        ...options.cache,
      },
      (policy) => this.#createTiers(hostSlots, diskSlots, policy),
    );
    this.#adopt();
    const eosTokens = new Set([FAKE_EOS]);
    const { loadAheadBlocks = 8 } = options;
    const engineOptions = { maxBatchTokens, maxSequences, maxBiases, maxWaiting, loadAheadBlocks, eosTokens };
    this.engine = new Engine(this.cache, this.runner, engineOptions, () => this.nowMs);
  }

  /** What a harness that takes over host memory and disk begins with. */
  get legacy(): Pick<HarnessOptions, "medium" | "survivor"> {
    return {
      medium: this.disk?.crash("kill") ?? this.medium,
      survivor: { slots: new Uint8Array(this.device.arena.bytes).slice(), headers: this.headers.slice() },
    };
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
      isTruncating: true,
      rewrittenTokens: 0,
      keep: {},
      isHeld: false,
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

  /** Turns engine and device until no request is left. */
  runToEnd(betweenTurns: () => void = () => {}): void {
    for (let turn = 0; !this.engine.isIdle; turn++) {
      expect(turn, "the engine does not come to an end").toBeLessThan(100_000);
      this.turn();
      betweenTurns();
    }
  }

  /** Engine and device go on by about one step; time passes, and which stream is ahead of which is chance. */
  turn(): void {
    this.onTurn();
    this.nowMs++;
    this.step();
    for (let round = 0; round < 4; round++) {
      for (const stream of STREAMS) {
        for (let count = this.random.integer(0, 6); count > 0; count--) this.device.advance(stream);
      }
    }
    if (!this.runner.finishStep()) {
      for (const stream of STREAMS) this.device.advance(stream);
    }
  }

  /** Lets everything that moves come to rest, and what is idle for `idleMs` go to disk. */
  settle(idleMs = 0): void {
    this.runToEnd();
    const endMs = this.nowMs + idleMs;
    for (let turn = 0; this.nowMs < endMs || this.cache.moves.inFlight > 0; turn++) {
      expect(turn, "the cache does not come to rest").toBeLessThan(10_000);
      this.turn();
      this.device.drain();
    }
    this.device.drain();
  }

  /** What the model answers to this request when there is no cache. */
  reference(request: Pick<EngineRequest, "tokens" | "maxTokens" | "sampling">) {
    return referenceAnswer(request.tokens, request, new ReferenceView(this.device.layers, this.cache.rule));
  }

  answer(request: number, choice = 0): ChoiceLog {
    return this.choices.get(`${request}/${choice}`) ?? { tokens: [], finish: null };
  }

  /** Everything ended and everything was given back. */
  expectNothingLeft(): void {
    this.settle();
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
    if (event.type === "begun") {
      this.announced.push(...event.blockIds);
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

  #createTiers(hostSlots: number, diskSlots: number, policy: KvCache["policy"]): LowerTiers {
    if (hostSlots === 0) return { host: null, disk: null };
    const { slotBytes, arena, memory } = this.device;
    const fingerprint = this.options.fingerprint ?? "fake";
    const { survivor } = this.options;
    if (survivor !== undefined) {
      new Uint8Array(arena.bytes).set(survivor.slots);
      this.headers.set(survivor.headers);
    }
    const checksum = (address: typeof arena.address, bytes: number) => Bun.hash.xxHash64(memory.view(address, bytes));
    const host = new HostTier(
      { slotCount: hostSlots, slotBytes, slotsAddress: arena.address, headers: this.headers, fingerprint, checksum },
      policy.host,
    );
    if (this.disk === null) return { host, disk: null };
    const store = new DiskStore(this.disk, {
      slotCount: diskSlots,
      slotBytes,
      fingerprint,
      headerBuffers: memory.allocate(4 * HEADER_BYTES),
      readTimeoutMs: 500,
      writeTimeoutMs: 500,
    });
    return { host, disk: new DiskTier(store, policy.disk, (message) => this.messages.push(message)) };
  }

  #adopt(): void {
    const { residency } = this.cache;
    const { host, disk } = residency.tiers;
    if (host !== null && this.options.survivor !== undefined) adoptHost(host, residency, this.nowMs);
    if (disk !== null) this.messages.push(...adoptDisk(disk, residency, "the medium", this.nowMs));
  }
}
