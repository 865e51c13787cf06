// The real disk file: what it refuses, what it keeps, and what it does where the file system will not play along.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, rmSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Disk, type DiskCompletion, type DiskRequest } from "../../../sidecar/native-disk.ts";
import {
  type Device,
  type HostAddress,
  type HostBuffer,
  NativeError,
  Status,
} from "../../../sidecar/native.ts";
import { cpuLibrary, cpuLibraryPath } from "../../support/cpu-library.ts";
import { type FileSystem, MountedFileSystem } from "../../support/mounted-filesystem.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";
import { openTinyDevice } from "../../support/tiny-device.ts";

const MIB = 2 ** 20;
const CLOSE_US = 10_000_000;

let device: Device;
let folder: string;
let memory: HostBuffer;
beforeAll(() => {
  device = openTinyDevice();
  memory = device.allocHost(4 * MIB);
  folder = mkdtempSync(join(tmpdir(), "kvasir-disk-"));
});
afterAll(() => {
  device.close();
  rmSync(folder, { recursive: true });
});

/** Waits on the device, as the engine does, until `count` completions came (each may wake it anew); by tag. */
function reapAll(disk: Disk, count: number): Map<number, DiskCompletion> {
  disk.wake(device);
  const completions = new Map<number, DiskCompletion>();
  let idleWaits = 0;
  while (completions.size < count) {
    const reaped = disk.reap();
    for (const completion of reaped) completions.set(completion.tag, completion);
    idleWaits = reaped.length > 0 ? 0 : idleWaits + 1;
    if (idleWaits > 100) throw new Error("completions do not come");
    if (completions.size < count) device.wait(100_000);
  }
  return completions;
}

function submitAll(disk: Disk, requests: readonly DiskRequest[]): Map<number, DiskCompletion> {
  expect(disk.submit(requests)).toBe(requests.length);
  return reapAll(disk, requests.length);
}

function request(operation: DiskRequest["operation"], tag: number, offsetBytes: number, bytes: number): DiskRequest {
  return { tag, offsetBytes, bytes, operation, address: (memory.address + offsetBytes) as HostAddress };
}

/** Status of the NativeError that it throws. */
function statusOf(action: () => unknown): { status: number; message: string } {
  try {
    action();
  } catch (error) {
    if (error instanceof NativeError) return { status: error.status, message: error.message };
    throw error;
  }
  return { status: Status.ok, message: "nothing was thrown" };
}

function open(name: string, bytes = 4 * MIB, threads = 4): Disk {
  return new Disk(cpuLibrary, join(folder, name), bytes, threads);
}

describe("disk file", () => {
  const seed = testSeed();
  test(`what is written is read, with the checksum of its bytes (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    const content = new Uint8Array(memory.bytes);
    const disk = open("round-trip");
    expect(disk.isNew).toBe(true);
    const requests = random.shuffled([...Array(64).keys()]).map((i) => request("write", i, i * 65_536, 65_536));
    for (let i = 0; i < content.length; i++) content[i] = random.next() * 256;
    const expected = content.slice();
    const sums = requests.map(({ address, bytes }) => cpuLibrary.checksum(address, bytes));
    const written = submitAll(disk, requests);
    expect(requests.map(({ tag }) => written.get(tag)!.checksum)).toEqual(sums);
    content.fill(0);
    const read = submitAll(disk, requests.map((one) => ({ ...one, operation: "read" as const })));
    expect(requests.map(({ tag }) => read.get(tag)!.checksum)).toEqual(sums);
    expect(Buffer.compare(content, expected)).toBe(0);
    expect(submitAll(disk, [request("sync", 99, 0, 0)]).get(99)!.status).toBe(Status.ok);
    disk.close(CLOSE_US);
  });

  test("takes as many requests as its queue holds, and each ends once", () => {
    const disk = open("queue", 4 * MIB, 1);
    const taken: number[] = [];
    for (let tag = 0; taken.length < 3000; tag++) {
      if (disk.submit([request(tag % 2 === 0 ? "write" : "read", tag, 0, 4096)]) === 0) break;
      taken.push(tag);
    }
    expect(taken).toHaveLength(1024);
    const completions = reapAll(disk, 1024);
    expect([...completions.keys()].sort((a, b) => a - b)).toEqual(taken);
    expect(disk.reap()).toEqual([]);
    expect(disk.submit([request("read", 1, 0, 4096)])).toBe(1);
    disk.close(CLOSE_US);
  });

  test("reads overtake writes that have not begun", () => {
    const disk = open("overtaking", 4 * MIB, 1);
    const writes = [0, 1, 2, 3].map((tag) => request("write", tag, 0, 4096));
    const order = [...submitAll(disk, [...writes, request("sync", 4, 0, 0), request("read", 5, 0, 4096)]).keys()];
    expect(order).toEqual([5, 0, 1, 2, 3, 4]);
    disk.close(CLOSE_US);
  });

  test("refuses what is not aligned or lies outside, and then takes nothing", () => {
    const disk = open("refuses");
    const good = request("read", 0, 0, 4096);
    const bad: DiskRequest[] = [
      { ...good, offsetBytes: 512 },
      { ...good, bytes: 4095 },
      { ...good, bytes: 0 },
      { ...good, address: (good.address + 8) as HostAddress },
      { ...good, offsetBytes: 4 * MIB },
      { ...good, offsetBytes: 4 * MIB - 4096, bytes: 8192 },
      { ...good, offsetBytes: 2 ** 52 },
    ];
    for (const one of bad) expect(statusOf(() => disk.submit([good, one])).status).toBe(Status.invalid);
    expect(disk.reap()).toEqual([]);
    expect(statusOf(() => disk.readNow(4 * MIB - 1, new Uint8Array(2))).status).toBe(Status.invalid);
    expect(statusOf(() => open("odd", 5000)).status).toBe(Status.invalid);
    expect(statusOf(() => open("no-threads", 4096, 1000)).status).toBe(Status.invalid);
    disk.close(CLOSE_US);
  });

  test("another size keeps what fits; what is new is zero", () => {
    const pattern = new Uint8Array(4 * MIB).map((_, i) => i * 31 + (i >> 12));
    let disk = open("resized");
    disk.writeNow(0, pattern);
    disk.close(CLOSE_US);
    for (const [before, after] of [[4, 6], [6, 2], [2, 4]] as const) {
      disk = open("resized", after * MIB);
      expect(disk.isNew).toBe(false);
      const kept = Math.min(before, after, 2 <= after ? 4 : 2) * MIB;
      const content = new Uint8Array(after * MIB);
      disk.readNow(0, content);
      expect(Buffer.compare(content.subarray(0, kept), pattern.subarray(0, kept))).toBe(0);
      expect(content.subarray(kept).every((byte) => byte === 0)).toBe(true);
      disk.close(CLOSE_US);
    }
    expect(statSync(join(folder, "resized")).size).toBe(4 * MIB);
  });

  test("discard leaves zeros, and is refused while a request is not reaped", () => {
    const disk = open("discarded");
    disk.writeNow(12_345, new Uint8Array(100).fill(7));
    expect(disk.submit([request("read", 1, 0, 4096)])).toBe(1);
    expect(statusOf(() => disk.discard()).status).toBe(Status.invalid);
    reapAll(disk, 1);
    disk.discard();
    const content = new Uint8Array(4 * MIB).fill(1);
    disk.readNow(0, content);
    expect(content.every((byte) => byte === 0)).toBe(true);
    disk.close(CLOSE_US);
  });

  test("is private, also when it was not", () => {
    writeFileSync(join(folder, "open-to-all"), "");
    chmodSync(join(folder, "open-to-all"), 0o666);
    for (const name of ["open-to-all", "fresh"]) {
      open(name).close(CLOSE_US);
      expect(statSync(join(folder, name)).mode & 0o777).toBe(0o600);
    }
  });

  test("is no symbolic link, folder or pipe", () => {
    writeFileSync(join(folder, "target"), "precious");
    symlinkSync(join(folder, "target"), join(folder, "link"));
    mkdirSync(join(folder, "folder"));
    expect(Bun.spawnSync(["mkfifo", join(folder, "pipe")]).exitCode).toBe(0);
    expect(statusOf(() => open("link"))).toMatchObject({ status: Status.io });
    expect(statusOf(() => open("link")).message).toContain("it is a symbolic link");
    expect(statusOf(() => open("folder")).status).toBe(Status.io);
    expect(statusOf(() => open("pipe")).message).toContain("not a regular file");
    expect(statSync(join(folder, "target")).size).toBe(8);
  });

  test("belongs to one process at a time, and is free again when that is killed", async () => {
    const path = join(folder, "shared");
    const holder = new URL("../../support/disk-holder.ts", import.meta.url).pathname;
    const child = Bun.spawn([process.execPath, holder, cpuLibraryPath, path, String(4 * MIB)], { stdout: "pipe" });
    const { value } = await child.stdout.getReader().read();
    expect(new TextDecoder().decode(value)).toBe("open\n");
    const refused = statusOf(() => open("shared"));
    expect(refused).toEqual({ status: Status.inUse, message: `cannot lock ${path}: another process uses it` });
    // Also with another size: whoever is refused must not have cut the file.
    expect(statusOf(() => open("shared", MIB)).status).toBe(Status.inUse);
    expect(statSync(path).size).toBe(4 * MIB);
    child.kill("SIGKILL");
    await child.exited;
    open("shared").close(CLOSE_US);
  });

  test("closing waits for what is in flight; a closed disk is closed", () => {
    const disk = open("closed", 4 * MIB, 2);
    for (let tag = 0; tag < 64; tag++) disk.submit([request("write", tag, tag * 65_536, 65_536)]);
    disk.close(CLOSE_US);
    disk.close(CLOSE_US);
    expect(existsSync(join(folder, "closed"))).toBe(true);
  });
});

/** A test that says why it was skipped. */
function testOn(type: FileSystem, bytes: number, name: string, body: (path: string) => void): void {
  const probe = MountedFileSystem.mount(type, bytes);
  probe?.[Symbol.dispose]();
  if (probe === null) console.log(`skipped, ${type} cannot be mounted (no root?): ${name}`);
  test.skipIf(probe === null)(name, () => {
    using mounted = MountedFileSystem.mount(type, bytes)!;
    body(join(mounted.path, "cache"));
  });
}

describe("disk file on a file system", () => {
  testOn("tmpfs", 4 * MIB, "without room: refused, and what was there before stays, no larger", (path) => {
    const refused = statusOf(() => new Disk(cpuLibrary, path, 8 * MIB, 1));
    expect(refused.status).toBe(Status.noSpace);
    expect(refused.message).toContain(`no room for ${8 * MIB} bytes at ${path}`);
    expect(statSync(path).blocks).toBe(0);
    let disk = new Disk(cpuLibrary, path, MIB, 1);
    disk.writeNow(5000, new Uint8Array([1, 2, 3]));
    disk.close(CLOSE_US);
    expect(statusOf(() => new Disk(cpuLibrary, path, 8 * MIB, 1)).status).toBe(Status.noSpace);
    expect(statSync(path)).toMatchObject({ size: MIB, blocks: MIB / 512 });
    disk = new Disk(cpuLibrary, path, MIB, 1);
    const content = new Uint8Array(3);
    disk.readNow(5000, content);
    expect([...content]).toEqual([1, 2, 3]);
    disk.close(CLOSE_US);
  });

  testOn("ramfs", 0, "that refuses O_DIRECT and fallocate: works without, and says so", (path) => {
    const disk = new Disk(cpuLibrary, path, 4 * MIB, 2);
    expect([disk.isDirect, disk.isPreallocated]).toEqual([false, false]);
    new Uint8Array(memory.bytes).fill(42);
    const written = submitAll(disk, [request("write", 1, 65_536, 65_536)]);
    new Uint8Array(memory.bytes).fill(0);
    const read = submitAll(disk, [request("read", 1, 65_536, 65_536)]);
    expect(read.get(1)).toMatchObject({ status: Status.ok, checksum: written.get(1)!.checksum });
    expect(new Uint8Array(memory.bytes)[65_536]).toBe(42);
    disk.close(CLOSE_US);
  });

  testOn("ext2", 4 * MIB, "without fallocate that fills up: writes fail with no space, reads go on", (path) => {
    const disk = new Disk(cpuLibrary, path, 16 * MIB, 2);
    expect(disk.isPreallocated).toBe(false);
    const statuses = [...Array(64).keys()].map((i) => {
      const one = { ...request("write", i, i * 65_536 * 4, 65_536 * 4), address: memory.address };
      return submitAll(disk, [one]).get(i)!.status;
    });
    expect(new Set(statuses)).toEqual(new Set([Status.ok, Status.noSpace]));
    expect(statuses[0]).toBe(Status.ok);
    expect(statuses.at(-1)).toBe(Status.noSpace);
    expect(submitAll(disk, [request("read", 1, 0, 65_536)]).get(1)!.status).toBe(Status.ok);
    disk.close(CLOSE_US);
  });
});
