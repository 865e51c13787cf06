// A load on its way layer by layer: how far it is enqueued, and what a step that waits for it may count on.

import { expect, test } from "bun:test";
import { EventPool, LayerTransfer } from "../../../sidecar/kvcache/layer-transfer.ts";
import { FakeDevice } from "../../support/fake-device.ts";

const LAYERS = 8;
const NOW_MS = 0;
const SLOT = 1;
const BLOCK = 2;

class Fixture {
  readonly device: FakeDevice;
  readonly transfer: LayerTransfer;
  /** Layers whose copies the device was asked for. */
  readonly enqueued: number[] = [];

  constructor(queueCapacity: number) {
    const { enqueued } = this;
    this.device = new FakeDevice({ blockCount: 3, blockTokens: 4, layers: LAYERS, hostSlots: 2, queueCapacity });
    const loadLayer = this.device.loadLayer.bind(this.device);
    this.device.loadLayer = (layer, ...rest) => {
      const isTaken = loadLayer(layer, ...rest);
      if (isTaken) enqueued.push(layer);
      return isTaken;
    };
    for (let layer = 0; layer < LAYERS; layer++) this.#write(layer);
    this.transfer = new LayerTransfer(
      this.device, new EventPool(this.device), "load", Int32Array.of(SLOT), Int32Array.of(BLOCK), LAYERS, NOW_MS,
    );
  }

  /** A step's layers: what each would read. */
  read(): number[] {
    const seen: number[] = [];
    for (let layer = 0; layer < LAYERS; layer++) {
      this.transfer.awaitLayer("compute", layer);
      this.device.enqueue("compute", () => seen.push(this.device.read([BLOCK], layer, 0)));
    }
    this.device.drain();
    return seen;
  }

  #write(layer: number): void {
    const at = SLOT * this.device.slotBytes + layer * this.device.blockTokens * 4;
    new Uint32Array(this.device.arena.bytes, at, this.device.blockTokens).fill(100 + layer);
  }
}

const EXPECTED = Array.from({ length: LAYERS }, (_, layer) => 100 + layer);

test("a step's copies are enqueued beside its layers, a little ahead", () => {
  const fixture = new Fixture(1000);
  fixture.transfer.begin();
  expect(fixture.enqueued.length).toBeLessThan(LAYERS / 2);
  expect(fixture.transfer.isFlowing).toBe(true);
  fixture.transfer.awaitLayer("compute", 0);
  expect(fixture.enqueued.length).toBe(3);
  expect(fixture.enqueued.length).toBeLessThan(LAYERS);
  expect(fixture.read()).toEqual(EXPECTED);
  expect(fixture.enqueued).toEqual([...EXPECTED.keys()]);
  expect(fixture.transfer.isDone()).toBe(true);
});

test("without a step it goes on by itself", () => {
  const { transfer, device, enqueued } = new Fixture(1000);
  transfer.begin();
  expect(transfer.pump()).toBe(true);
  device.drain();
  expect(transfer.isDone()).toBe(true);
  expect(enqueued.length).toBe(LAYERS);
});

test("a full queue: no step may count on the rest until it was taken", () => {
  const { transfer, device } = new Fixture(2);
  transfer.begin();
  expect(transfer.isFlowing).toBe(false);
  while (!transfer.pump()) device.wait();
  expect(transfer.isFlowing).toBe(true);
  device.drain();
  expect(transfer.isDone()).toBe(true);
});

test("a queue that fills while a step is being enqueued is waited for", () => {
  const fixture = new Fixture(4);
  fixture.transfer.begin();
  expect(fixture.read()).toEqual(EXPECTED);
  expect(fixture.transfer.isDone()).toBe(true);
});
