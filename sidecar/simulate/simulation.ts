// One run: sessions arrive, their turns queue first come first served, the service computes them, the store
// keeps their KV. Deterministic: a config gives one result.

import { paperWindow, type Waiter } from "../kvcache/policy.ts";
import { Conversation, type SimulatedBlock, type TruncationOptions } from "./conversation.ts";
import { EventQueue } from "./event-queue.ts";
import { GpuService, type ServiceOptions } from "./gpu-service.ts";
import { type Measured, Measurements } from "./measurements.ts";
import { AccessLog } from "./optimum.ts";
import { exponential } from "./random.ts";
import { type StoreOptions, TieredStore } from "./tiered-store.ts";
import type { Session, Turn } from "./trace.ts";

export interface SimulationConfig extends ServiceOptions, StoreOptions, TruncationOptions {
  readonly sessions: readonly Session[];
  /** Sessions to run; more than the trace has: it starts over. */
  readonly sessionCount: number;
  readonly blockTokens: number;
  /** Poisson, per second; null: as the trace says, times `timeScale`. */
  readonly sessionRate: number | null;
  /** Stretches the trace's own arrival times. */
  readonly timeScale: number;
  /** Mean of the exponential pause between an answer and the next turn, where the trace does not say. */
  readonly thinkMs: number;
  /** The first turns to be served are not measured. */
  readonly warmupTurns: number;
  readonly seed: number;
}

interface RunningSession {
  readonly index: number;
  readonly turns: Session;
  readonly startMs: number;
  readonly conversation: Conversation;
}

interface WaitingTurn {
  readonly session: RunningSession;
  readonly turnIndex: number;
  readonly newTokens: number;
  readonly arrivedMs: number;
  readonly historyTokens: number;
  readonly waiter: Waiter<SimulatedBlock>;
}

export class Simulation {
  readonly events = new EventQueue();
  readonly store: TieredStore;
  readonly #gpu: GpuService;
  readonly #accesses: AccessLog;
  readonly #measurements: Measurements;
  readonly #queue: WaitingTurn[] = [];
  #queueStart = 0;

  constructor(readonly config: SimulationConfig) {
    this.store = new TieredStore(this.events, config);
    this.#gpu = new GpuService(this.events, config);
    this.#accesses = new AccessLog(config.gpuBlocks + config.hostBlocks + config.diskBlocks);
    this.#measurements = new Measurements(config.warmupTurns);
  }

  run(): Measured {
    this.#planSessions();
    this.events.run();
    this.store.checkInvariants();
    const { hostBlocks, diskBlocks, blockBytes } = this.config;
    const sequenceBytes = this.#measurements.meanHistoryBlocks * blockBytes;
    return this.#measurements.result({
      makespanMs: this.events.nowMs,
      prefillMs: this.#gpu.prefillMs,
      decodeMs: this.#gpu.decodeMs,
      computedTokens: this.#gpu.computedTokens,
      bytes: {
        diskRead: this.store.readBlocks * blockBytes,
        diskReadOnDemand: this.store.demandReadBlocks * blockBytes,
        diskWritten: this.store.writtenBlocks * blockBytes,
      },
      blockBytes,
      skippedSaveBlocks: this.store.skippedSaveBlocks,
      lostBlocks: this.store.lostBlocks,
      expiredBlocks: this.store.expiredBlocks,
      prefetchWindowSequences: paperWindow(hostBlocks * blockBytes, sequenceBytes),
      evictionWindowSequences: paperWindow((hostBlocks + diskBlocks) * blockBytes, sequenceBytes),
      optimum: this.#accesses.optimum(this.config.warmupTurns),
    });
  }

  #planSessions(): void {
    const { sessions, sessionCount, sessionRate, timeScale, seed, blockTokens } = this.config;
    let poissonMs = 0;
    for (let index = 0; index < sessionCount; index++) {
      const turns = sessions[index % sessions.length]!;
      if (sessionRate !== null) poissonMs += exponential(1000 / sessionRate, seed, 1, index);
      const startMs = sessionRate === null ? turns[0]!.arrivalMs! * timeScale : poissonMs;
      const session = { index, turns, startMs, conversation: new Conversation(blockTokens) };
      this.events.at(startMs, () => this.#arrive(session, 0));
    }
  }

  #arrive(session: RunningSession, turnIndex: number): void {
    const { conversation } = session;
    const turn = session.turns[turnIndex]!;
    if (turn.keptTokens !== null) this.store.drop(conversation.keep(turn.keptTokens));
    const newTokens = this.#fitNewTokens(turn);
    this.store.drop(conversation.truncate(newTokens + turn.outputTokens, this.config));
    const waiter = this.store.policy.enqueue(this.store.cachedPrefix(conversation.blocks));
    const historyTokens = conversation.tokenCount;
    this.#queue.push({ session, turnIndex, newTokens, arrivedMs: this.events.nowMs, historyTokens, waiter });
    this.#measurements.queueChanged(this.events.nowMs, 1, conversation.blocks.length);
    this.#admit();
    this.store.maintain();
  }

  /** A message that alone exceeds the context is cut. */
  #fitNewTokens({ newTokens, outputTokens }: Turn): number {
    const { contextTokens } = this.config;
    return contextTokens === 0 ? newTokens : Math.max(1, Math.min(newTokens, contextTokens - outputTokens));
  }

  #admit(): void {
    while (this.#gpu.hasFreeSlot && this.#queueStart < this.#queue.length) {
      const turn = this.#queue[this.#queueStart++]!;
      if (this.#queueStart > 1024 && this.#queueStart * 2 > this.#queue.length) {
        this.#queue.splice(0, this.#queueStart);
        this.#queueStart = 0;
      }
      this.#start(turn);
    }
  }

  #start(waiting: WaitingTurn): void {
    const { events, store } = this;
    const { blocks } = waiting.session.conversation;
    this.#gpu.takeSlot();
    this.#measurements.queueChanged(events.nowMs, -1, -blocks.length);
    const cached = store.cachedPrefix(blocks);
    const reuse = this.#measurements.started(waiting, blocks, cached, (block) => store.tierOf(block)!);
    this.#accesses.start(waiting.session.index, blocks);
    const loadedBlocks = cached.length - reuse.gpuBlocks;
    store.open(cached, () =>
      this.#gpu.submit({
        computedTokens: waiting.newTokens + waiting.historyTokens - reuse.cachedTokens,
        loadedBytes: loadedBlocks * this.config.blockBytes,
        outputTokens: waiting.session.turns[waiting.turnIndex]!.outputTokens,
        onFirstToken: () => reuse.firstToken(events.nowMs),
        onFinish: () => this.#finish(waiting, cached),
      }),
    );
    store.policy.dequeue(waiting.waiter);
    this.#measurements.loaded(loadedBlocks);
  }

  #finish({ session, turnIndex, newTokens }: WaitingTurn, used: readonly SimulatedBlock[]): void {
    const { conversation, turns } = session;
    const changed = new Set(conversation.append(newTokens + turns[turnIndex]!.outputTokens));
    this.#measurements.saved(changed.size);
    this.store.close(used, conversation.blocks, changed);
    const next = turnIndex + 1;
    if (next < turns.length) {
      this.#accesses.finish(session.index, conversation.blocks);
      this.events.at(this.#nextArrivalMs(session, next), () => this.#arrive(session, next));
    }
    this.#admit();
  }

  /** A turn never arrives before the answer that it replies to. */
  #nextArrivalMs(session: RunningSession, turnIndex: number): number {
    const { nowMs } = this.events;
    const { thinkMs, timeScale, seed, sessionRate } = this.config;
    const [first, turn] = [session.turns[0]!, session.turns[turnIndex]!];
    if (turn.arrivalMs === null) return nowMs + exponential(thinkMs, seed, 2, session.index, turnIndex);
    const sinceStartMs = (turn.arrivalMs - first.arrivalMs!) * (sessionRate === null ? timeScale : 1);
    return Math.max(nowMs, session.startMs + sinceStartMs);
  }
}
