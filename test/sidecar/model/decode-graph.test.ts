// When a decode step is captured, replayed, or enqueued kernel by kernel.

import { describe, expect, test } from "bun:test";
import type { Batch } from "../../../sidecar/model/batch.ts";
import { decodeBuckets, DecodeGraphs } from "../../../sidecar/model/decode-graph.ts";
import type { Device } from "../../../sidecar/native.ts";

/** Notes what is asked of it. */
class FakeDevice {
  readonly calls: string[] = [];
  constructor(readonly canCapture: boolean) {}
  graphBegin(key: number): boolean {
    this.calls.push(`begin ${key}`);
    return this.canCapture;
  }
  graphEnd(key: number): void {
    this.calls.push(`end ${key}`);
  }
  graphLaunch(key: number): void {
    this.calls.push(`launch ${key}`);
  }
}

class FakeBatch {
  readonly limits = { maxRows: 64 };
  padded: number[] = [];
  constructor(
    readonly sequenceCount: number,
    public rowCount = sequenceCount,
    public logitCount = sequenceCount,
  ) {}
  padTo(rowCount: number, logitCount: number): void {
    this.padded.push(rowCount, logitCount);
    this.rowCount = rowCount;
    this.logitCount = logitCount;
  }
}

function graphs(device: FakeDevice): { prepareAndRun(batch: FakeBatch): void } {
  const graphs = new DecodeGraphs(device as unknown as Device, 32);
  return {
    prepareAndRun(batch) {
      graphs.prepare(batch as unknown as Batch);
      graphs.run(batch as unknown as Batch, () => device.calls.push("operations"));
    },
  };
}

describe("decode graphs", () => {
  test("come in few sizes, up to the most sequences", () => {
    expect(decodeBuckets(20)).toEqual([1, 2, 4, 8, 16, 20]);
    expect(decodeBuckets(1)).toEqual([1]);
    expect(decodeBuckets(8)).toEqual([1, 2, 4, 8]);
  });

  test("are captured once a size and launched from then on, smaller batches padded", () => {
    const device = new FakeDevice(true);
    const { prepareAndRun } = graphs(device);
    prepareAndRun(new FakeBatch(5));
    const second = new FakeBatch(7);
    prepareAndRun(second);
    expect(second.padded).toEqual([8, 8]);
    prepareAndRun(new FakeBatch(9));
    const [small, large] = [["begin 8", "operations", "end 8"], ["begin 16", "operations", "end 16"]];
    expect(device.calls).toEqual([...small, "launch 8", ...large]);
  });

  test("leave batches with prompts alone", () => {
    const device = new FakeDevice(true);
    const batch = new FakeBatch(2, 30, 2);
    graphs(device).prepareAndRun(batch);
    expect(batch.padded).toEqual([]);
    expect(device.calls).toEqual(["operations"]);
  });

  test("are given up where the library captures none", () => {
    const device = new FakeDevice(false);
    const { prepareAndRun } = graphs(device);
    prepareAndRun(new FakeBatch(3));
    const second = new FakeBatch(3);
    prepareAndRun(second);
    expect(second.padded).toEqual([]);
    expect(device.calls).toEqual(["begin 4", "operations", "operations"]);
  });

  test("are not used by a batch that was not prepared", () => {
    const device = new FakeDevice(true);
    const unprepared = new DecodeGraphs(device as unknown as Device, 32);
    unprepared.run(new FakeBatch(4) as unknown as Batch, () => device.calls.push("operations"));
    expect(device.calls).toEqual(["operations"]);
  });
});
