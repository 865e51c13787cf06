// A group of blocks on its way between host slots and gpu blocks, layer by layer, so that a step can start before the
// last layer has come (CachedAttention, USENIX ATC '24, 3.2): layer i's attention waits for load i alone.

import { assert } from "../assert.ts";
import type { EventHandle, Stream } from "../native.ts";

/** The part of a device that copies blocks; tests give a fake. */
export interface CopyDevice {
  createEvent(): EventHandle;
  record(stream: Stream, event: EventHandle, watch: boolean): void;
  streamWait(stream: Stream, event: EventHandle): void;
  /** Throws when what the event stands for has failed. */
  isDone(event: EventHandle): boolean;
  /** Sleeps until something has ended, or for so long. */
  wait(timeoutUs: number): boolean;
  /** One layer of many blocks, load stream; false: the stream's queue is full, nothing happened. */
  loadLayer(layer: number, hostSlots: Int32Array, blocks: Int32Array, event: EventHandle): boolean;
  /** The same on the save stream, the other way. */
  saveLayer(layer: number, blocks: Int32Array, hostSlots: Int32Array, event: EventHandle): boolean;
}

/** Events are never given back to the device: those of ended transfers are used again. */
export class EventPool {
  readonly #free: EventHandle[] = [];

  constructor(readonly device: Pick<CopyDevice, "createEvent">) {}

  take(): EventHandle {
    return this.#free.pop() ?? this.device.createEvent();
  }

  give(events: readonly EventHandle[]): void {
    this.#free.push(...events);
  }
}

/** Beyond the layer that a step is about to read: enough for the stream not to run dry while the step is enqueued. */
const LAYERS_AHEAD = 2;
const FULL_QUEUE_WAIT_US = 1000;

export class LayerTransfer {
  readonly #events: EventHandle[] = [];
  #isRefused = false;
  #doneLayers = 0;
  /** Set by who sees it end. */
  endedAtMs: number | null = null;

  constructor(
    readonly device: CopyDevice,
    readonly pool: EventPool,
    readonly direction: "load" | "save",
    readonly hostSlots: Int32Array,
    readonly gpuBlocks: Int32Array,
    readonly layers: number,
    readonly startedAtMs: number,
  ) {
    assert(hostSlots.length === gpuBlocks.length && hostSlots.length > 0, "as many slots as blocks");
  }

  /** The stream takes what it is given: a step that will read the blocks need not wait until all layers are. */
  get isFlowing(): boolean {
    return !this.#isRefused;
  }

  /** Gives the stream its first layers; whoever waits for a later one gives more. */
  begin(): void {
    this.pump(Math.min(LAYERS_AHEAD, this.layers));
  }

  /** Gives the stream the layers up to `end` that it takes now; false when its queue was full. */
  pump(end = this.layers): boolean {
    this.#isRefused = !this.#give(end);
    return !this.#isRefused;
  }

  #give(end: number): boolean {
    while (this.#events.length < end) {
      const event = this.pool.take();
      const layer = this.#events.length;
      const isTaken =
        this.direction === "load"
          ? this.device.loadLayer(layer, this.hostSlots, this.gpuBlocks, event)
          : this.device.saveLayer(layer, this.gpuBlocks, this.hostSlots, event);
      if (!isTaken) {
        this.pool.give([event]);
        return false;
      }
      this.#events.push(event);
    }
    return true;
  }

  /** Leading layers that have arrived. Throws when a copy failed. */
  readyLayers(): number {
    while (this.#doneLayers < this.#events.length && this.device.isDone(this.#events[this.#doneLayers]!)) {
      this.#doneLayers++;
    }
    return this.#doneLayers;
  }

  isDone(): boolean {
    return this.readyLayers() === this.layers;
  }

  /** What is enqueued on `stream` from here on sees this layer's blocks. The next layers' copies are enqueued, too. */
  awaitLayer(stream: Stream, layer: number): void {
    const end = Math.min(layer + 1 + LAYERS_AHEAD, this.layers);
    while (!this.pump(end) && this.#events.length <= layer) this.device.wait(FULL_QUEUE_WAIT_US);
    if (layer >= this.#doneLayers) this.device.streamWait(stream, this.#events[layer]!);
  }

  /** Its events may serve others. Only when done. */
  dispose(): void {
    this.pool.give(this.#events.splice(0));
  }
}
