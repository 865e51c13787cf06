// The host tier's memory: named memory survives its process and is adopted only by one that lays it out the same way.

import { afterEach, describe, expect, test } from "bun:test";
import { randomBytes } from "node:crypto";
import { existsSync, rmSync, statfsSync, statSync } from "node:fs";
import { type Device, type HostArena, hostView, NativeError, Status } from "../../../sidecar/native.ts";
import { OperationDevice } from "../../support/operation-device.ts";

const name = `/kvasir-test-${process.pid}-${randomBytes(4).toString("hex")}`;
const file = `/dev/shm${name}`;
const open: OperationDevice[] = [];

function device(config: ConstructorParameters<typeof OperationDevice>[0] = {}): Device {
  const operations = new OperationDevice(config);
  open.push(operations);
  return operations.device;
}

afterEach(() => {
  for (const operations of open.splice(0)) operations[Symbol.dispose]();
  rmSync(file, { force: true });
});

/** Writes a byte into every header and slot, or says which bytes are there. */
function mark(owner: Device, arena: HostArena, slotCount: number, value: number): void {
  const { slotBytes } = owner.blockBytes();
  new Uint8Array(hostView(arena.headersAddress, slotCount * 4096)).fill(value);
  new Uint8Array(hostView(arena.slotsAddress, slotCount * slotBytes)).fill(value);
}

function bytesIn(owner: Device, arena: HostArena, slotCount: number): Set<number> {
  const { slotBytes } = owner.blockBytes();
  return new Set([
    ...new Uint8Array(hostView(arena.headersAddress, slotCount * 4096)),
    ...new Uint8Array(hostView(arena.slotsAddress, slotCount * slotBytes)),
  ]);
}

describe.skipIf(!existsSync("/dev/shm"))("named memory", () => {
  test("is private, and adopted with all that is in it by a device that lays it out the same way", () => {
    const first = device();
    const made = first.openHostArena(name, 3);
    expect(made).toMatchObject({ isShared: true, isAdopted: false });
    expect(statSync(file).mode & 0o777).toBe(0o600);
    mark(first, made, 3, 0x5a);
    first.closeHostArena(false);
    first.close();

    const second = device();
    const adopted = second.openHostArena(name, 3);
    expect(adopted).toMatchObject({ isShared: true, isAdopted: true });
    expect(bytesIn(second, adopted, 3)).toEqual(new Set([0x5a]));
    second.closeHostArena(true);
    expect(existsSync(file)).toBe(false);
  });

  for (const [what, config, slotCount] of [
    ["another number of slots", {}, 4],
    ["another block size of the same bytes", { blockTokens: 16, headDim: 8 }, 3],
    ["another dtype of the same bytes", { kvDtype: "f16", headDim: 32 }, 3],
  ] as const) {
    test(`is not adopted by ${what}: its headers are empty`, () => {
      const first = device();
      mark(first, first.openHostArena(name, 3), 3, 0x5a);
      first.closeHostArena(false);
      const other = device(config);
      const arena = other.openHostArena(name, slotCount);
      expect(arena).toMatchObject({ isShared: true, isAdopted: false });
      const headers = new Uint8Array(hostView(arena.headersAddress, slotCount * 4096));
      expect(headers.every((byte) => byte === 0)).toBe(true);
    });
  }

  test("belongs to one device at a time", () => {
    const first = device();
    first.openHostArena(name, 3);
    const second = device();
    try {
      second.openHostArena(name, 3);
      throw new Error("it was opened twice");
    } catch (error) {
      expect(error).toBeInstanceOf(NativeError);
      expect((error as NativeError).status).toBe(Status.inUse);
      expect((error as NativeError).message).toContain(name);
    }
    first.closeHostArena(false);
    expect(second.openHostArena(name, 3).isAdopted).toBe(true);
  });

  test("that cannot be had is refused with both numbers, and leaves nothing behind", () => {
    const huge = device({ layers: 64, headDim: 512, blockTokens: 256, kvHeads: 1 });
    const { slotBytes } = huge.blockBytes();
    const { bsize, blocks } = statfsSync("/dev/shm");
    // Twice what there is of either: no attempt may begin.
    const bytes = 2 * Math.max(bsize * blocks, huge.memoryInfo().totalBytes);
    try {
      huge.openHostArena(name, Math.ceil(bytes / slotBytes));
      throw new Error("more memory than there is was handed out");
    } catch (error) {
      expect(error).toBeInstanceOf(NativeError);
      expect((error as NativeError).status).toBe(Status.outOfMemory);
      expect((error as NativeError).message).toMatch(/wants \d+ bytes, \d+ are free/);
    }
    expect(existsSync(file)).toBe(false);
  });

  test("has a name of one part", () => {
    for (const wrong of ["kvasir", "/a/b", `/${"x".repeat(300)}`]) {
      expect(() => device().openHostArena(wrong, 1)).toThrow("name");
    }
  });
});

test("anonymous memory is opened once, and is empty", () => {
  const owner = device();
  const arena = owner.openHostArena(null, 2);
  expect(arena).toMatchObject({ isShared: false, isAdopted: false });
  expect(bytesIn(owner, arena, 2)).toEqual(new Set([0]));
  expect(() => owner.openHostArena(null, 2)).toThrow("open already");
  owner.closeHostArena(true);
  expect(() => owner.closeHostArena(true)).toThrow("no host arena");
});
