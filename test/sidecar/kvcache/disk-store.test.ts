// The disk tier by hand: one operation, one fault, one restart at a time.

import { describe, expect, test } from "bun:test";
import { AssertionError } from "../../../sidecar/assert.ts";
import { encodeHeader, fingerprintDigest, HEADER_BYTES } from "../../../sidecar/kvcache/block-header.ts";
import { headerOffset, payloadOffset } from "../../../sidecar/kvcache/disk-layout.ts";
import { NativeError, Status } from "../../../sidecar/native.ts";
import { DiskHarness, type HarnessOptions, testId, testIdentity } from "../../support/disk-harness.ts";
import { PAGE_BYTES } from "../../support/disk-medium.ts";
import { NO_FAULTS } from "../../support/faulty-disk.ts";

function reopen(harness: DiskHarness, options: HarnessOptions = {}): ReturnType<typeof DiskHarness.open> {
  return DiskHarness.open({ medium: harness.disk.crash("kill"), slotCount: harness.slotCount, ...options });
}

/** Slot by number of the block. */
function found({ scanned }: ReturnType<typeof DiskHarness.open>): Record<number, number> {
  return Object.fromEntries(scanned.blocks.map(({ id, slot }) => [Number(id.replaceAll("#", "")), slot]));
}

/** Bytes of every request from now on. */
function watchSizes({ disk }: DiskHarness): number[] {
  const sizes: number[] = [];
  const { submit } = disk;
  disk.submit = (requests) => {
    sizes.push(...requests.map(({ bytes }) => bytes));
    return submit.call(disk, requests);
  };
  return sizes;
}

describe("DiskStore", () => {
  test("reads what was written, also after a restart", () => {
    const before = DiskHarness.open();
    expect(before.scanned).toMatchObject({ blocks: [], discarded: "new" });
    const content = before.randomContent();
    expect(before.write(2, 7, content)).toMatchObject({ kind: "write", outcome: "ok", bytes: 8192 });
    expect(before.read(2)).toMatchObject({ event: { outcome: "ok", bytes: 8192 }, content });
    const after = reopen(before);
    expect(after.scanned).toMatchObject({ discarded: null, blocks: [{ slot: 2, ...testIdentity(7) }] });
    expect(after.read(2)).toMatchObject({ event: { outcome: "ok" }, content });
  });

  test("an overwritten block is gone, an erased one too, and reading such a slot is corrupt", () => {
    const harness = DiskHarness.open();
    for (const [slot, number] of [[0, 1], [1, 2], [0, 3]] as const) {
      expect(harness.write(slot, number, harness.randomContent()).outcome).toBe("ok");
    }
    expect(harness.erase(1)).toMatchObject({ kind: "erase", outcome: "ok", bytes: 0 });
    expect(harness.read(1).event.outcome).toBe("corrupt");
    expect(found(reopen(harness))).toEqual({ 3: 0 });
  });

  test("erases are durable, and one sync serves many", () => {
    const harness = DiskHarness.open({ slotCount: 8, headerBuffers: 8 });
    for (let slot = 0; slot < 8; slot++) harness.write(slot, slot, harness.randomContent());
    const { submit } = harness.disk;
    let syncs = 0;
    harness.disk.submit = (requests) => {
      syncs += requests.filter(({ operation }) => operation === "sync").length;
      return submit.call(harness.disk, requests);
    };
    for (let slot = 0; slot < 8; slot++) harness.store.erase(slot, 0);
    expect(harness.settle().map(({ outcome }) => outcome)).toEqual(new Array(8).fill("ok"));
    expect(syncs).toBeLessThan(8);
    for (let round = 0; round < 20; round++) {
      const medium = harness.disk.crash("power failure");
      expect(DiskHarness.open({ medium, slotCount: 8 }).scanned.blocks).toEqual([]);
    }
  });

  test("an erase that was written while a sync ran waits for the next one", () => {
    const harness = DiskHarness.open();
    for (const slot of [0, 1]) harness.write(slot, slot, harness.randomContent());
    const { submit } = harness.disk;
    harness.disk.submit = (requests) => {
      harness.disk.faults = { ...NO_FAULTS, hang: requests[0]!.operation === "sync" ? 1 : 0 };
      return submit.call(harness.disk, requests);
    };
    const polls = (): string[] =>
      Array.from({ length: 50 }, () => harness.poll()).flat().map(({ kind, slot }) => `${kind} ${slot}`);
    harness.store.erase(0, 0);
    expect(polls()).toEqual([]);
    harness.store.erase(1, 0);
    expect(polls()).toEqual([]);
    harness.disk.release();
    expect(polls()).toEqual(["erase 0"]);
    harness.disk.release();
    expect(polls()).toEqual(["erase 1"]);
  });

  test("writes that need a header buffer wait, and do not block those that have one", () => {
    const harness = DiskHarness.open({ slotCount: 8, headerBuffers: 1 });
    for (let slot = 0; slot < 8; slot++) harness.write(slot, slot, harness.randomContent());
    expect(harness.store.freeWriteCount).toBe(1);
    const buffers = Array.from({ length: 8 }, () => harness.takeBuffer(harness.randomContent()));
    buffers.forEach(({ address }, slot) => harness.store.write(slot, address, testIdentity(10 + slot), 0));
    expect(harness.store.freeWriteCount).toBe(0);
    expect(harness.settle().filter(({ outcome }) => outcome === "ok")).toHaveLength(8);
    expect(harness.store.freeWriteCount).toBe(1);
  });

  test("operations on one slot run in the order in which they were started", () => {
    const harness = DiskHarness.open({ headerBuffers: 8 });
    const [first, second, third] = [1, 2, 3].map(() => harness.randomContent());
    const [a, b, c] = [first!, second!, third!].map((content) => harness.takeBuffer(content));
    const [x, y] = [harness.takeBuffer(), harness.takeBuffer()];
    harness.store.write(0, a!.address, testIdentity(1), 0);
    harness.store.read(0, x.address, 0);
    harness.store.erase(0, 0);
    harness.store.write(0, b!.address, testIdentity(2), 0);
    harness.store.write(0, c!.address, testIdentity(3), 0);
    harness.store.read(0, y.address, 0);
    const events = harness.settle().map(({ kind, outcome }) => `${kind} ${outcome}`);
    expect(events).toEqual(["write ok", "read ok", "erase ok", "write ok", "write ok", "read ok"]);
    expect(Buffer.compare(new Uint8Array(x.bytes), first!)).toBe(0);
    expect(Buffer.compare(new Uint8Array(y.bytes), third!)).toBe(0);
    expect(found(reopen(harness))).toEqual({ 3: 0 });
  });

  test("a failed payload, header or erase is reported, and the slot can be used again", () => {
    const harness = DiskHarness.open();
    harness.disk.faults = { ...NO_FAULTS, noSpace: 1 };
    expect(harness.write(0, 1, harness.randomContent()).outcome).toBe("no-space");
    harness.disk.faults = { ...NO_FAULTS, torn: 1 };
    expect(harness.write(0, 1, harness.randomContent()).outcome).toBe("io");
    expect(harness.read(0).event.outcome).toBe("corrupt");
    harness.disk.faults = NO_FAULTS;
    expect(harness.write(0, 2, harness.randomContent()).outcome).toBe("ok");
    harness.disk.faults = { ...NO_FAULTS, io: 1 };
    expect(harness.read(0).event.outcome).toBe("io");
    expect(harness.erase(0).outcome).toBe("io");
    harness.disk.faults = NO_FAULTS;
    expect(harness.read(0).event.outcome).toBe("corrupt");
    expect(harness.erase(0).outcome).toBe("ok");
    expect(found(reopen(harness))).toEqual({});
  });

  test("a header that failed after its payload is not believed by this process", () => {
    const harness = DiskHarness.open();
    const { submit } = harness.disk;
    harness.disk.submit = (requests) => {
      const isHeader = requests[0]!.bytes === HEADER_BYTES;
      harness.disk.faults = { ...NO_FAULTS, io: isHeader ? 1 : 0 };
      return submit.call(harness.disk, requests);
    };
    expect(harness.write(0, 1, harness.randomContent()).outcome).toBe("io");
    expect(harness.read(0).event.outcome).toBe("corrupt");
  });

  test("a flipped bit is corrupt: on the way once, on the medium for good", () => {
    const harness = DiskHarness.open();
    const content = harness.randomContent();
    harness.write(0, 1, content);
    harness.disk.faults = { ...NO_FAULTS, flip: 1 };
    expect(harness.read(0).event.outcome).toBe("corrupt");
    harness.disk.faults = NO_FAULTS;
    expect(harness.read(0)).toMatchObject({ event: { outcome: "ok" }, content });
    harness.medium.flipBit(payloadOffset(0, 8192) / PAGE_BYTES + 1, 12_345);
    expect(harness.read(0).event.outcome).toBe("corrupt");
    expect(reopen(harness).read(0).event.outcome).toBe("corrupt");
  });

  test("one poll takes all that ended", () => {
    const harness = DiskHarness.open();
    for (const slot of [0, 1, 2]) harness.write(slot, slot, harness.randomContent());
    for (const slot of [0, 1, 2]) harness.store.read(slot, harness.takeBuffer().address, 0);
    const { reap } = harness.disk;
    const ended: ReturnType<typeof reap> = [];
    while (harness.disk.inFlight > 0) ended.push(...reap.call(harness.disk));
    harness.disk.reap = () => ended.splice(0, 1);
    expect(harness.poll()).toHaveLength(3);
  });

  test("where an erase failed, the next write erases first", () => {
    const harness = DiskHarness.open();
    harness.write(0, 1, harness.randomContent());
    harness.disk.faults = { ...NO_FAULTS, io: 1 };
    expect(harness.erase(0).outcome).toBe("io");
    harness.disk.faults = NO_FAULTS;
    const sizes = watchSizes(harness);
    harness.write(0, 2, harness.randomContent());
    harness.write(1, 3, harness.randomContent());
    expect(sizes).toEqual([4096, 8192, 4096, 8192, 4096]);
  });

  test("needs scan() first, once, and a slot that exists", () => {
    const harness = new DiskHarness();
    expect(() => harness.store.erase(0, 0)).toThrow("scan() comes first");
    harness.store.scan();
    expect(() => harness.store.scan()).toThrow(AssertionError);
    expect(() => harness.store.erase(4, 0)).toThrow("no disk slot 4");
  });
});

describe("DiskStore timeouts", () => {
  test("a read that does not end is given up; its memory is free when the kernel answers", () => {
    const harness = DiskHarness.open({ readTimeoutMs: 100 });
    harness.write(0, 1, harness.randomContent());
    harness.disk.faults = { ...NO_FAULTS, hang: 1 };
    const buffer = harness.takeBuffer();
    harness.store.read(0, buffer.address, harness.nowMs);
    harness.disk.faults = NO_FAULTS;
    expect(harness.poll()).toEqual([]);
    harness.nowMs += 100;
    expect(harness.poll()).toMatchObject([{ kind: "read", slot: 0, outcome: "timeout", bytes: 0 }]);
    expect(harness.store.operationCount).toBe(1);
    expect(harness.poll()).toEqual([]);
    harness.disk.release();
    expect(harness.settle()).toMatchObject([{ kind: "released", slot: 0, outcome: "timeout" }]);
    expect(harness.read(0).event.outcome).toBe("ok");
  });

  test("a read that only waits for its slot is given up and free at once", () => {
    const harness = DiskHarness.open({ readTimeoutMs: 100 });
    harness.disk.faults = { ...NO_FAULTS, hang: 1 };
    const [source, destination] = [harness.takeBuffer(harness.randomContent()), harness.takeBuffer()];
    harness.store.write(0, source.address, testIdentity(1), 0);
    harness.store.read(0, destination.address, 0);
    harness.nowMs = 100;
    expect(harness.poll()).toMatchObject([{ kind: "read", outcome: "timeout" }, { kind: "released" }]);
    harness.disk.faults = NO_FAULTS;
    harness.disk.release();
    expect(harness.settle()).toMatchObject([{ kind: "write", outcome: "ok" }]);
  });

  test("a write that does not end is given up, believed by nobody, and its slot usable later", () => {
    const harness = DiskHarness.open({ headerBuffers: 2, writeTimeoutMs: 100 });
    harness.disk.faults = { ...NO_FAULTS, hang: 1 };
    const buffers = [0, 1, 2].map(() => harness.takeBuffer(harness.randomContent()));
    buffers.forEach(({ address }, slot) => harness.store.write(slot, address, testIdentity(slot), 0));
    harness.disk.faults = NO_FAULTS;
    harness.nowMs = 100;
    const events = harness.poll();
    expect(events.filter(({ kind }) => kind === "write")).toHaveLength(3);
    expect(events.filter(({ kind }) => kind === "released")).toMatchObject([{ slot: 2 }]);
    expect(harness.store.freeWriteCount).toBe(0);
    harness.disk.release();
    expect(harness.settle().map(({ kind }) => kind)).toEqual(["released", "released"]);
    expect(harness.store.freeWriteCount).toBe(2);
    expect(found(reopen(harness))).toEqual({});
    for (const slot of [0, 1, 2]) expect(harness.write(slot, slot, harness.randomContent()).outcome).toBe("ok");
  });

  test("an erase whose sync does not end is given up", () => {
    const harness = DiskHarness.open({ writeTimeoutMs: 100 });
    harness.write(0, 1, harness.randomContent());
    harness.store.erase(0, harness.nowMs);
    const { submit } = harness.disk;
    harness.disk.submit = (requests) => {
      harness.disk.faults = { ...NO_FAULTS, hang: requests[0]!.operation === "sync" ? 1 : 0 };
      return submit.call(harness.disk, requests);
    };
    for (let polls = 0; polls < 50; polls++) expect(harness.poll()).toEqual([]);
    harness.disk.submit = submit;
    harness.disk.faults = NO_FAULTS;
    harness.nowMs += 100;
    expect(harness.poll()).toMatchObject([{ kind: "erase", outcome: "timeout" }, { kind: "released" }]);
    harness.disk.release();
    harness.poll();
    expect(harness.write(0, 2, harness.randomContent()).outcome).toBe("ok");
  });
});

describe("DiskStore restarts", () => {
  function written(): DiskHarness {
    const harness = DiskHarness.open({ slotCount: 600 });
    for (const slot of [0, 255, 256, 599]) harness.write(slot, slot, harness.randomContent());
    return harness;
  }

  test("a larger file keeps every block, a smaller one those that fit, and cut ones stay away", () => {
    const before = written();
    const grown = reopen(before, { slotCount: 1400 });
    expect(found(grown)).toEqual({ 0: 0, 255: 255, 256: 256, 599: 599 });
    for (const slot of [0, 255, 256, 599]) expect(grown.read(slot).event.outcome).toBe("ok");
    const cut = reopen(before, { slotCount: 590 });
    expect(found(cut)).toEqual({ 0: 0, 255: 255, 256: 256 });
    expect(cut.scanned.dropped.outside).toBe(1);
    const regrown = reopen(cut, { slotCount: 600 });
    expect(found(regrown)).toEqual({ 0: 0, 255: 255, 256: 256 });
    expect(regrown.scanned.dropped).toMatchObject({ outside: 0, corrupt: 0 });
  });

  test.each([
    ["fingerprint", { fingerprint: "model 2" }, 4],
    ["slot-size", { slotBytes: 12_288 }, 0],
    ["fingerprint", { fingerprint: "model 2", slotBytes: 12_288 }, 4],
  ] as const)("another %s drops the whole file, for good", (discarded, options, counted) => {
    const before = written();
    const other = reopen(before, options);
    expect(other.scanned).toMatchObject({ discarded, blocks: [], dropped: { fingerprint: counted, corrupt: 0 } });
    const ids = counted === 0 ? [] : [0, 255, 256, 599].map(testId);
    expect(other.scanned.former?.ids.toSorted() ?? []).toEqual(ids.toSorted());
    other.write(1, 5, other.randomContent());
    expect(found(reopen(other, options))).toEqual({ 5: 1 });
    expect(reopen(other, {}).scanned).toMatchObject({ discarded, blocks: [] });
  });

  test("another format version drops the whole file", () => {
    const before = written();
    const page = new Uint8Array(PAGE_BYTES);
    before.medium.read(0, page);
    new DataView(page.buffer).setUint32(8, 0, true);
    new DataView(page.buffer).setBigUint64(PAGE_BYTES - 8, Bun.hash.xxHash64(page.subarray(0, -8)), true);
    before.medium.writePage(0, page);
    expect(reopen(before).scanned).toMatchObject({ discarded: "version", blocks: [] });
  });

  test("a rotten or unreadable first page drops the whole file", () => {
    const before = written();
    const unreadable = new DiskHarness({ medium: before.disk.crash("kill"), slotCount: 600 });
    unreadable.disk.readNow = () => {
      throw new NativeError(Status.io, "bad sector");
    };
    expect(unreadable.store.scan()).toMatchObject({ discarded: "corrupt", blocks: [] });
    before.medium.flipBit(0, 100);
    expect(reopen(before).scanned).toMatchObject({ discarded: "corrupt", blocks: [] });
  });

  test("of two blocks with one id the younger counts, and the older never comes back", () => {
    const before = DiskHarness.open();
    const [old, young] = [before.randomContent(), before.randomContent()];
    before.write(3, 7, old);
    before.write(1, 7, young);
    const after = reopen(before);
    expect(found(after)).toEqual({ 7: 1 });
    expect(after.scanned.dropped.duplicate).toBe(1);
    expect(after.read(1)).toMatchObject({ event: { outcome: "ok" }, content: young });
    after.erase(1);
    expect(found(reopen(after))).toEqual({});
  });

  test("a younger one is younger also when written after another restart", () => {
    const before = DiskHarness.open();
    for (let round = 0; round < 5; round++) before.write(2, 1, before.randomContent());
    const after = reopen(before);
    after.write(0, 1, after.randomContent());
    expect(found(reopen(after))).toEqual({ 1: 0 });
  });

  test("a table full of garbage is dropped, counted and emptied; every slot is usable", () => {
    const before = DiskHarness.open({ slotCount: 64 });
    for (let slot = 0; slot < 64; slot++) {
      const page = before.randomContent().subarray(0, PAGE_BYTES);
      if (slot % 4 === 1) page.set(new TextEncoder().encode("KVSBLOCK"));
      const header = { ...testIdentity(slot), generation: 1, payloadChecksum: 1n };
      if (slot % 4 === 2) encodeHeader(page, fingerprintDigest("model 2"), header);
      if (slot % 4 === 3) encodeHeader(page, fingerprintDigest("model"), header);
      before.medium.writePage(headerOffset(slot, 8192) / PAGE_BYTES, page);
    }
    const after = reopen(before);
    expect(after.scanned.dropped).toMatchObject({ corrupt: 32, fingerprint: 16 });
    expect(after.scanned.blocks).toHaveLength(16);
    for (const { slot } of after.scanned.blocks) expect(after.read(slot).event.outcome).toBe("corrupt");
    for (let slot = 0; slot < 64; slot++) {
      const content = after.randomContent();
      expect(after.write(slot, slot, content).outcome).toBe("ok");
      expect(after.read(slot)).toMatchObject({ event: { outcome: "ok" }, content });
    }
    expect(reopen(after).scanned).toMatchObject({ dropped: { corrupt: 0, fingerprint: 0, duplicate: 0 } });
  });

  test("emptying headers leaves the payloads between two groups alone", () => {
    const before = written();
    for (const slot of [255, 256]) before.medium.flipBit(headerOffset(slot, 8192) / PAGE_BYTES, 500);
    const after = reopen(before);
    expect(after.scanned.dropped.corrupt).toBe(2);
    expect(found(after)).toEqual({ 0: 0, 599: 599 });
    expect(after.read(0).event.outcome).toBe("ok");
  });

  test("headers that cannot be read or emptied are dropped one by one; their slots are usable", () => {
    const before = DiskHarness.open();
    for (let slot = 0; slot < 4; slot++) before.write(slot, slot, before.randomContent());
    const after = new DiskHarness({ medium: before.disk.crash("kill") });
    const { readNow, writeNow } = after.disk;
    after.disk.readNow = (offset, bytes) => {
      const [begin, end] = [headerOffset(1, 8192), headerOffset(3, 8192)];
      after.disk.faults = { ...NO_FAULTS, io: offset < end && offset + bytes.length > begin ? 1 : 0 };
      readNow.call(after.disk, offset, bytes);
    };
    after.disk.writeNow = (offset, bytes) => {
      after.disk.faults = { ...NO_FAULTS, io: 1 };
      writeNow.call(after.disk, offset, bytes);
    };
    const scanned = after.store.scan();
    expect(scanned.dropped.unreadable).toBe(2);
    expect(scanned.blocks.map(({ id }) => id)).toEqual([testId(0), testId(3)]);
    after.disk.faults = NO_FAULTS;
    const sizes = watchSizes(after);
    expect(after.write(1, 9, after.randomContent()).outcome).toBe("ok");
    expect(sizes).toEqual([4096, 8192, 4096]);
    expect(after.read(1).event.outcome).toBe("ok");
  });
});
