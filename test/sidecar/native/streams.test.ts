// Streams, events, waiting and full queues of the CPU library: order is what waits and events say, whatever the
// threads do.

import { describe, expect, test } from "bun:test";
import { type Device, type EventHandle, postTo, Status } from "../../../sidecar/native.ts";
import { cpuLibrary } from "../../support/cpu-library.ts";
import { KvAccess, NO_ADDRESS, normals, OperationDevice } from "../../support/operation-device.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const WAIT_US = 60_000_000;

function waitFor(device: Device, event: EventHandle): void {
  while (!device.isDone(event)) device.wait(WAIT_US);
}

/** A device, and work that keeps its compute stream busy for some hundred milliseconds. */
class BusyDevice {
  readonly operations = new OperationDevice({ isa: "portable", threadCount: 1, maxRows: 512 });
  readonly device = this.operations.device;
  readonly #size = 1024;
  readonly #weight = this.device.createWeight(this.#size, this.#size, "f32");
  readonly #x = this.operations.place(normals(new SeededRandom(1), 512 * this.#size));
  readonly #y = this.operations.poisoned(512 * this.#size);

  work(): void {
    for (let i = 0; i < 4; i++) {
      this.device.matmul({
        y: this.#y, x: this.#x, weight: this.#weight, bias: NO_ADDRESS, rowCount: 512, output: "f32",
      });
    }
  }

  [Symbol.dispose](): void {
    this.operations[Symbol.dispose]();
  }
}

describe("an event", () => {
  test("is done when it was never recorded, pending while its stream works, then done", () => {
    using busy = new BusyDevice();
    const { device } = busy;
    const event = device.createEvent();
    expect(device.isDone(event)).toBe(true);
    busy.work();
    device.record("compute", event, true);
    expect(device.isDone(event)).toBe(false);
    waitFor(device, event);
    expect(device.isDone(event)).toBe(true);
  });

  test("recorded anew is pending again, and a stream that waited for it before does not wait again", () => {
    using busy = new BusyDevice();
    const { device } = busy;
    const [first, loaded] = [device.createEvent(), device.createEvent()];
    device.record("compute", first, false);
    device.streamWait("load", first);
    busy.work();
    device.record("compute", first, true);
    device.record("load", loaded, true);
    waitFor(device, loaded);
    expect(device.isDone(first)).toBe(false);
    waitFor(device, first);
  });
});

describe("wait", () => {
  test("returns for a watched event and for a post, and runs out of time otherwise", () => {
    using operations = new OperationDevice();
    const { device } = operations;
    expect(device.wait(0)).toBe(false);
    const event = device.createEvent();
    device.record("save", event, true);
    expect(device.wait(WAIT_US)).toBe(true);
    device.record("save", event, false);
    while (!device.isDone(event));
    expect(device.wait(1000)).toBe(false);
    device.post();
    postTo(cpuLibrary, device.handle);
    expect(device.wait(WAIT_US)).toBe(true);
    expect(device.wait(0)).toBe(false);
  });

  test("is woken by another thread", async () => {
    using operations = new OperationDevice();
    const worker = new Worker(new URL("../../support/post-worker.ts", import.meta.url));
    worker.postMessage({ path: cpuLibrary.path, handle: operations.device.handle });
    expect(operations.device.wait(WAIT_US)).toBe(true);
    worker.terminate();
  });
});

describe("a full queue", () => {
  test("refuses a copy, changes nothing, and takes it when there is room again", () => {
    using busy = new BusyDevice();
    const { device } = busy;
    const kv = new KvAccess(device, 2);
    const size = 2 * 8 * 16;
    kv.write(0, 0, new Float32Array(size).fill(5));
    const [gate, copied] = [device.createEvent(), device.createEvent()];
    busy.work();
    device.record("compute", gate, true);
    device.streamWait("load", gate);
    const filler = device.createEvent();
    let accepted = 0;
    while (device.loadLayer(0, Int32Array.of(0), Int32Array.of(1), filler)) {
      if (++accepted > 100_000) throw new Error("the queue has no end");
    }
    expect(accepted).toBeGreaterThan(100);
    expect(device.loadLayer(0, Int32Array.of(0), Int32Array.of(0), copied)).toBe(false);
    expect(device.isDone(copied)).toBe(true);
    // Records need a place, too: the last odd one may be free.
    expect(() => {
      for (let i = 0; i < 2; i++) device.record("load", filler, true);
    }).toThrow("full");
    waitFor(device, gate);
    waitFor(device, filler);
    expect(device.loadLayer(0, Int32Array.of(0), Int32Array.of(1), copied)).toBe(true);
    waitFor(device, copied);
    expect(kv.read(0, 1)).toEqual(new Float32Array(size).fill(5));
  });

  test("of the compute stream refuses operations with `busy`", () => {
    using busy = new BusyDevice();
    const { device } = busy;
    busy.work();
    const event = device.createEvent();
    let status: number = Status.ok;
    for (let i = 0; i < 100_000 && status === Status.ok; i++) {
      status = cpuLibrary.symbols.kvs_record(device.handle as never, 0, event, 0);
    }
    expect(status).toBe(Status.busy);
    busy.operations.device.close();
  });
});

describe("streams", () => {
  const seed = testSeed();

  test(`copy blocks in the order that events give, through all three (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    using operations = new OperationDevice({ layers: 2, blockTokens: 8, headDim: 16 });
    const { device } = operations;
    const blockCount = 6;
    const kv = new KvAccess(device, blockCount);
    const size = 2 * 8 * 16;
    const contents = Array.from({ length: blockCount }, (_, block) => [block, block + 0.5]);
    contents.forEach((layers, block) => {
      layers.forEach((value, layer) => kv.write(layer, block, new Float32Array(size).fill(value)));
    });
    // The host slots hold the same as the blocks now; from here on both are kept track of.
    const hosts = contents.map((layers) => [...layers]);
    const pick = (): number => random.integer(0, blockCount - 1);
    let previous: { stream: "compute" | "load" | "save"; event: EventHandle } | null = null;
    for (let i = 0; i < 300; i++) {
      const stream = (["compute", "load", "save"] as const)[random.integer(0, 2)]!;
      const [from, to, layer] = [pick(), pick(), random.integer(0, 1)];
      const event = device.createEvent();
      if (previous !== null && previous.stream !== stream) device.streamWait(stream, previous.event);
      if (stream === "compute") {
        device.copyBlocks(Int32Array.of(from), Int32Array.of(to));
        device.record("compute", event, false);
        contents[to] = [...contents[from]!];
      } else if (stream === "load") {
        device.loadLayer(layer, Int32Array.of(from), Int32Array.of(to), event);
        contents[to]![layer] = hosts[from]![layer]!;
      } else {
        device.saveLayer(layer, Int32Array.of(from), Int32Array.of(to), event);
        hosts[to]![layer] = contents[from]![layer]!;
      }
      previous = { stream, event };
    }
    waitFor(device, previous!.event);
    contents.forEach((layers, block) => {
      layers.forEach((value, layer) => expect(new Set(kv.read(layer, block))).toEqual(new Set([value])));
    });
  });

  test("run what is queued before a device closes", () => {
    const busy = new BusyDevice();
    busy.work();
    const buffer = busy.device.allocHost(4);
    const source = busy.operations.place(Float32Array.of(3));
    busy.device.copyOut(buffer.address, source, 4);
    busy.device.close();
    busy.device.close();
  });
});
