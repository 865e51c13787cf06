// What becomes of the cache when its process ends: killed at any moment, stopped in order, started again with another
// number format, on a file full of garbage, on a disk or in shared memory without room. Real processes with the bundled
// model: whatever is found again, the answers are those of a run that found nothing.

import { afterAll, afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, mkdtempSync, openSync, rmSync, statSync, writeSync } from "node:fs";
import { type AddressInfo, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { GROUP_HEADER_BYTES } from "../../sidecar/kvcache/disk-layout.ts";
import type { ChatMessage } from "../../sidecar/protocol.ts";
import "../support/cpu-library.ts"; // built before the first test's time runs
import { MountedFileSystem } from "../support/mounted-filesystem.ts";
import { SeededRandom, testSeed } from "../support/seeded-random.ts";
import { Talker } from "../support/talker.ts";

setDefaultTimeout(120_000);

const SHARED_MEMORY = "/dev/shm";
/** Rounds of kill and restart: as many as fit into this time, and at least so many. */
const KILLING_MS = 20_000;
const ROUNDS = { min: 3, max: 10 };
/** Small enough to fill: gpu memory holds two conversations, host memory three. */
const SMALL_TIERS = ["--gpu-blocks", "12", "--host-memory", "6M", "--disk", "24M", "--max-model-len", "640"];
const FLAGS = [...SMALL_TIERS, "--disk-idle", "0.2", "--threads", "1", "--recompute", "never"];

const isRoot = process.getuid?.() === 0;
const seed = testSeed();
const folder = mkdtempSync(join(tmpdir(), "kvasir-survival-"));

afterEach(() => Talker.killAll());
afterAll(() => rmSync(folder, { recursive: true }));

const user = (content: string): ChatMessage => ({ role: "user", content });
const assistant = (content: string): ChatMessage => ({ role: "assistant", content });

/** A first message of about so many words that no other seed has. */
function opening(number: number, words = 60): string {
  const random = new SeededRandom(number);
  const names = ["river", "stone", "green", "letter", "morning", "seven", "captain", "garden", "winter", "silver"];
  return Array.from({ length: words }, () => names[random.integer(0, names.length - 1)]).join(" ");
}

/** Two turns, checked. Returns the messages for a third, and how many tokens of it should be found again. */
async function converse(talker: Talker, number: number) {
  const messages: ChatMessage[] = [user(opening(number))];
  let known = 0;
  for (const question of ["And then?", "Why?"]) {
    const { text, done } = await talker.askChecked(messages);
    known = done.usage.promptTokens + done.usage.completionTokens - 1;
    messages.push(assistant(text), user(question));
  }
  return { messages, known };
}

/** Of an end token that stopped the answer, the next step had perhaps computed the KV already. */
function expectFound(cached: number, known: number): void {
  expect(cached).toBeGreaterThanOrEqual(known);
  expect(cached).toBeLessThanOrEqual(known + 1);
}

/** As the sidecar names its host tier, in its main.ts. */
function mappingOf(data: string, diskPath: string): string {
  const key = `${process.getuid?.() ?? 0}\0${data}\0${diskPath}`;
  return join(SHARED_MEMORY, `kvasir-${new Bun.CryptoHasher("sha256").update(key).digest("hex").slice(0, 24)}`);
}

describe.skipIf(!existsSync(SHARED_MEMORY))("a sidecar's cache", () => {
  let data: string;
  const folders: string[] = [];
  const newData = () => {
    data = mkdtempSync(join(folder, "data-"));
    folders.push(data);
  };
  const blocksFile = () => join(data, "kv-cache", "blocks");
  const hasMapping = () => existsSync(mappingOf(data, blocksFile()));
  const start = (flags: readonly string[] = []) => Talker.start({ data, flags: [...FLAGS, ...flags] });

  test(`survives kill -9 at any moment (SEED=${seed})`, async () => {
    newData();
    const random = new SeededRandom(seed);
    const deadline = performance.now() + KILLING_MS;
    const served = { host: 0, disk: 0 };
    let messages: ChatMessage[] = [];
    let known = 0;
    let round = 0;
    for (; round < ROUNDS.min || (round < ROUNDS.max && performance.now() < deadline); round++) {
      const talker = await start(["--tiers", random.next() < 0.5 ? "inclusive" : "exclusive"]);
      if (round % 3 === 0) {
        messages = [user(opening(round))];
        known = 0;
      }
      const isKilledInAnswer = random.next() < 0.5;
      const { text, done, cached } = await talker.askChecked(messages);
      // All that was quiet before the kill is found.
      if (known > 0) expectFound(cached, known);
      served.host += done.usage.cachedTokens.host;
      served.disk += done.usage.cachedTokens.disk;
      messages.push(assistant(text), user(opening(100 + round, 8)));
      known = done.usage.promptTokens + done.usage.completionTokens - 1;
      await talker.quiet();
      // Killed in the middle of something else: an answer, or what is moved after it.
      const stream = talker.submit([user(opening(200 + round))], undefined, 60);
      for (let events = random.integer(0, 30); events > 0; events--) if ((await stream.next()).type === "done") break;
      if (!isKilledInAnswer) for (let turns = random.integer(0, 50); turns > 0; turns--) await talker.stats();
      await talker.kill();
    }
    console.log(`kill -9: ${round} rounds; tokens found again: ${served.host} in host memory, ${served.disk} on disk`);
    expect(served.host + served.disk).toBeGreaterThan(0);
    await (await start()).stop();
    expect(hasMapping()).toBe(false);
  });

  test("is on disk after an orderly stop, and in shared memory where it is kept", async () => {
    newData();
    const first = await start();
    const { messages, known } = await converse(first, 1);
    expect(hasMapping()).toBe(true);
    await first.stop();
    expect(hasMapping()).toBe(false);
    const second = await start(["--keep-host-cache", "--tiers", "inclusive"]);
    expectFound((await second.askChecked(messages)).done.usage.cachedTokens.disk, known);
    await second.stop();
    expect(hasMapping()).toBe(true);
    const third = await start();
    expect(third.process.output()).toMatch(/host tier: \d+ blocks of an earlier process, 0 headers not believed/);
    const { host, disk } = (await third.askChecked(messages)).done.usage.cachedTokens;
    expect(host).toBeGreaterThanOrEqual(known);
    expect(disk).toBe(0);
    await third.stop();
    expect(hasMapping()).toBe(false);
  });

  test("belongs to one sidecar at a time", async () => {
    newData();
    const first = await start();
    const refusal = /sidecar: another sidecar uses .*blocks: give this one another --data directory or --disk-path/;
    expect(await start().catch((error: Error) => error.message)).toMatch(refusal);
    await first.askChecked([user("Are you still there?")]);
    await first.stop();
  });

  test("is never met by another number format", async () => {
    newData();
    const first = await start(["--keep-host-cache"]);
    const { messages } = await converse(first, 2);
    await first.stop();
    // Of the same size, so that only the fingerprint tells.
    const second = await start(["--kv-dtype", "f16"]);
    expect(second.process.output()).toMatch(/disk tier: what .* held was dropped: it is of another fingerprint/);
    expect((await second.stats())["lostBlocks_fingerprint"]).toBeGreaterThan(0);
    const { cached, done } = await second.askChecked(messages);
    expect(cached).toBe(0);
    expect(done.missReasons["fingerprint"]).toBeGreaterThan(0);
    await second.stop();
    const third = await start(["--kv-dtype", "f32"]);
    expect((await third.askChecked(messages)).cached).toBe(0);
    await third.stop();
    expect(hasMapping()).toBe(false);
  });

  test(`is not believed where it is garbage (SEED=${seed})`, async () => {
    newData();
    const random = new SeededRandom(seed);
    const first = await start();
    const { messages, known } = await converse(first, 3);
    await first.stop();
    // First some of the payload, then the headers, then all that says whose file it is.
    const { size } = statSync(blocksFile());
    const ranges = [[4096 + GROUP_HEADER_BYTES, size], [4096, 4096 + GROUP_HEADER_BYTES], [0, 4096]] as const;
    for (const [begin, end] of ranges) {
      overwrite(blocksFile(), begin, end, random);
      const next = await start();
      const { done, cached } = await next.askChecked(messages);
      expect(cached).toBeLessThan(known);
      if (begin > GROUP_HEADER_BYTES) expect(done.missReasons["corrupt"]).toBeGreaterThan(0);
      await next.stop();
    }
  });

  test("does without shared memory where there is too little", async () => {
    newData();
    const script = `mount -t tmpfs -o size=1M tmpfs ${SHARED_MEMORY} && exec "$0" "$@"`;
    const wrapper = ["unshare", "-m", "sh", "-c", script];
    if (!isRoot || Bun.spawnSync([...wrapper, "true"]).exitCode !== 0) {
      console.log("skipped: a file system of its own for shared memory needs root");
      return;
    }
    const talker = await Talker.start({ data, flags: FLAGS, wrapper });
    expect(talker.process.output()).toContain("no room in shared memory");
    const { messages, known } = await converse(talker, 4);
    await talker.quiet();
    await talker.kill();
    const next = await Talker.start({ data, flags: FLAGS, wrapper });
    expectFound((await next.askChecked(messages)).done.usage.cachedTokens.disk, known);
    await next.stop();
  });

  test("asks for a smaller file where the disk has no room for it", async () => {
    newData();
    using disk = MountedFileSystem.mount("tmpfs", 8 * 2 ** 20);
    if (disk === null) return console.log("skipped: mounting a small file system needs root");
    const path = join(disk.path, "blocks");
    const refusal = /the disk tier wants \d+ MiB at .*, but only \d+ MiB are free: give a smaller --disk, or --disk 0/;
    expect(await start(["--disk-path", path]).catch((error: Error) => error.message)).toMatch(refusal);
    const talker = await start(["--disk-path", path, "--disk", "6M"]);
    await converse(talker, 5);
    await talker.stop();
  });

  test("grows where nothing can be allocated ahead, and goes on when the disk is full", async () => {
    newData();
    using disk = MountedFileSystem.mount("ext2", 8 * 2 ** 20);
    if (disk === null) return console.log("skipped: mounting a small file system needs root and mkfs.ext2");
    const flags = ["--disk-path", join(disk.path, "blocks")];
    const first = await start(flags);
    expect(first.process.output()).toContain("cannot be preallocated here");
    const { messages, known } = await converse(first, 6);
    await first.quiet();
    await first.kill();
    const second = await start(flags);
    expectFound((await second.askChecked(messages)).done.usage.cachedTokens.disk, known);
    // More than the disk holds.
    for (let number = 20; (await second.stats())["diskFailures"] === 0; number++) await converse(second, number);
    expect((await converse(second, 7)).known).toBeGreaterThan(0);
    await second.stop();
  });

  test("is not there where the sidecar cannot serve; a taken port is named before the model is loaded", async () => {
    newData();
    const other = createServer();
    const port = await new Promise<number>((resolve) => {
      other.listen(0, "127.0.0.1", () => resolve((other.address() as AddressInfo).port));
    });
    const refusal = await Talker.start({ data, port, flags: FLAGS }).catch((error: Error) => error.message);
    other.close();
    expect(refusal).toBe(
      `the sidecar ended: sidecar: port ${port} of 127.0.0.1 is taken: stop what listens there, ` +
        "or choose another with --port\n",
    );
    expect(existsSync(blocksFile())).toBe(false);
    mkdirSync(join(data, "holdings.sqlite")); // where its file should be
    expect(await start().catch((error: Error) => error.message)).toContain("EISDIR");
    expect(existsSync(blocksFile())).toBe(true);
    expect(hasMapping()).toBe(false);
  });

  test("leaves nothing behind in shared memory", () => {
    const behind = folders.map((path) => mappingOf(path, join(path, "kv-cache", "blocks"))).filter(existsSync);
    for (const path of behind) rmSync(path); // of a test that failed
    expect(behind).toEqual([]);
  });
});

function overwrite(path: string, begin: number, end: number, random: SeededRandom): void {
  const file = openSync(path, "r+");
  const page = new Uint8Array(4096);
  for (let at = begin; at < end; at += page.length) {
    for (let i = 0; i < page.length; i++) page[i] = random.integer(0, 255);
    writeSync(file, page, 0, page.length, at);
  }
}
