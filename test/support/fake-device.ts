// Streams, events and layered KV memory without a device. Each stream is a queue of work that runs in order and only
// when the test says so; a stream that waits for an event stands still until another one has come that far. So whatever
// the engine forgot to order happens in the wrong order sooner or later, and the values show it.

import { assert } from "../../sidecar/assert.ts";
import type { KvDevice } from "../../sidecar/kvcache/kv-cache.ts";
import type { EventHandle, HostAddress, HostBuffer, Stream } from "../../sidecar/native.ts";
import { FakeHostMemory } from "./faulty-disk.ts";

export const STREAMS = ["compute", "load", "save"] as const;

interface Work {
  readonly isReady: () => boolean;
  readonly run: () => void;
}

const ALWAYS = () => true;

export interface FakeDeviceOptions {
  readonly blockCount: number;
  readonly blockTokens: number;
  readonly layers: number;
  readonly hostSlots?: number;
  /** Calls that a copy stream takes before it says that it is full. */
  readonly queueCapacity?: number;
}

export class FakeDevice implements KvDevice {
  readonly layers: number;
  readonly blockTokens: number;
  readonly blockCount: number;
  readonly memory = new FakeHostMemory();
  readonly config: { readonly blockTokens: number };
  readonly slotBytes: number;
  /** Slots of the host tier. */
  readonly arena: HostBuffer;
  /** [block][layer][token] */
  readonly #values: Uint32Array;
  readonly #streams: Readonly<Record<Stream, Work[]>> = { compute: [], load: [], save: [] };
  /** Tickets recorded and finished, by event. */
  readonly #recorded = new Map<EventHandle, number>();
  readonly #finished = new Map<EventHandle, number>();
  readonly #queueCapacity: number;
  #nextEvent = 1;

  constructor({ blockCount, blockTokens, layers, hostSlots = 0, queueCapacity = 1000 }: FakeDeviceOptions) {
    this.layers = layers;
    this.blockTokens = blockTokens;
    this.blockCount = blockCount;
    this.config = { blockTokens };
    this.#queueCapacity = queueCapacity;
    this.#values = new Uint32Array(blockCount * layers * blockTokens).fill(0xdeadbeef);
    this.slotBytes = Math.ceil((layers * blockTokens * 4) / 4096) * 4096;
    this.arena = this.memory.allocate(Math.max(1, hostSlots) * this.slotBytes);
  }

  // ---- what the engine calls

  allocHost(bytes: number): HostBuffer {
    return this.memory.allocate(bytes);
  }

  createEvent(): EventHandle {
    return this.#nextEvent++ as EventHandle;
  }

  record(stream: Stream, event: EventHandle): void {
    const ticket = (this.#recorded.get(event) ?? 0) + 1;
    this.#recorded.set(event, ticket);
    this.enqueue(stream, () => this.#finished.set(event, ticket));
  }

  streamWait(stream: Stream, event: EventHandle): void {
    const ticket = this.#recorded.get(event) ?? 0;
    this.enqueue(stream, () => {}, () => (this.#finished.get(event) ?? 0) >= ticket);
  }

  isDone(event: EventHandle): boolean {
    return (this.#finished.get(event) ?? 0) === (this.#recorded.get(event) ?? 0);
  }

  /** Whoever waits lets the streams go on. */
  wait(): boolean {
    return STREAMS.map((stream) => this.advance(stream)).includes(true);
  }

  copyBlocks(sources: Int32Array, destinations: Int32Array): void {
    const [from, to] = [sources.slice(), destinations.slice()];
    this.enqueue("compute", () => {
      const size = this.layers * this.blockTokens;
      from.forEach((source, i) => this.#values.copyWithin(to[i]! * size, source * size, (source + 1) * size));
    });
  }

  loadLayer(layer: number, hostSlots: Int32Array, blocks: Int32Array, event: EventHandle): boolean {
    return this.#copyLayer("load", event, () => {
      hostSlots.forEach((slot, i) => this.#layer(blocks[i]!, layer).set(this.#hostLayer(slot, layer)));
    });
  }

  saveLayer(layer: number, blocks: Int32Array, hostSlots: Int32Array, event: EventHandle): boolean {
    return this.#copyLayer("save", event, () => {
      hostSlots.forEach((slot, i) => this.#hostLayer(slot, layer).set(this.#layer(blocks[i]!, layer)));
    });
  }

  // ---- what the test calls

  enqueue(stream: Stream, run: () => void, isReady: () => boolean = ALWAYS): void {
    this.#streams[stream].push({ run, isReady });
  }

  /** Does the stream's next piece of work; false when there is none, or it waits. */
  advance(stream: Stream): boolean {
    const work = this.#streams[stream][0];
    if (work === undefined || !work.isReady()) return false;
    this.#streams[stream].shift();
    work.run();
    return true;
  }

  /** Runs all streams until none can go on; all must be empty then. */
  drain(): void {
    while (STREAMS.map((stream) => this.advance(stream)).includes(true));
    for (const stream of STREAMS) assert(this.#streams[stream].length === 0, `${stream} waits for ever`);
  }

  /** Value of a position of a view in one layer. */
  read(blocks: ArrayLike<number>, layer: number, position: number): number {
    return this.#layer(this.#blockAt(blocks, position), layer)[position % this.blockTokens]!;
  }

  write(blocks: ArrayLike<number>, layer: number, position: number, value: number): void {
    this.#layer(this.#blockAt(blocks, position), layer)[position % this.blockTokens] = value;
  }

  slotAddress(slot: number): HostAddress {
    return (this.arena.address + slot * this.slotBytes) as HostAddress;
  }

  #copyLayer(stream: "load" | "save", event: EventHandle, copy: () => void): boolean {
    if (this.#streams[stream].length + 2 > this.#queueCapacity) return false;
    this.enqueue(stream, copy);
    this.record(stream, event);
    return true;
  }

  #blockAt(blocks: ArrayLike<number>, position: number): number {
    const block = blocks[Math.floor(position / this.blockTokens)];
    assert(block !== undefined && block >= 0 && block < this.blockCount, `no block at position ${position}`);
    return block;
  }

  #layer(block: number, layer: number): Uint32Array {
    const begin = (block * this.layers + layer) * this.blockTokens;
    return this.#values.subarray(begin, begin + this.blockTokens);
  }

  #hostLayer(slot: number, layer: number): Uint32Array {
    const at = slot * this.slotBytes + layer * this.blockTokens * 4;
    return new Uint32Array(this.arena.bytes, at, this.blockTokens);
  }
}
