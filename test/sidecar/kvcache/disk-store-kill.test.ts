// kill -9 at random moments, with a real process on a real file: what the process had said it stored is there, what is
// there is whole, and nothing that it had erased or overwritten comes back.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Device } from "../../../sidecar/native.ts";
import { openRealStore, WRITER_SLOT_BYTES, WRITER_SLOTS, writerContent } from "../../support/disk-writer.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";
import { openTinyDevice } from "../../support/tiny-device.ts";

const ROUNDS = 12;
const LINES_MAX = 300;
const WRITER = new URL("../../support/disk-writer.ts", import.meta.url).pathname;

let device: Device;
let folder: string;
beforeAll(() => {
  device = openTinyDevice();
  folder = mkdtempSync(join(tmpdir(), "kvasir-kill-"));
});
afterAll(() => {
  device.close();
  rmSync(folder, { recursive: true });
});

/** Runs the writer, kills it once it has said so many lines, and returns all that it said. */
async function writeAndKill(path: string, seed: number, lineCount: number): Promise<string[]> {
  const child = Bun.spawn([process.execPath, WRITER, path, String(seed)], { stdout: "pipe", stderr: "inherit" });
  const decoder = new TextDecoder();
  let text = "";
  for await (const chunk of child.stdout) {
    text += decoder.decode(chunk, { stream: true });
    if (text.split("\n").length > lineCount) child.kill("SIGKILL");
  }
  await child.exited;
  expect(child.signalCode).toBe("SIGKILL");
  return text.split("\n").slice(0, -1);
}

/** What each slot held when the writer last said so; absent: an operation was under way. */
function follow(said: readonly string[], holds: Map<number, string>): void {
  for (const line of said) {
    const [what, slot, ...state] = line.split(" ");
    expect(what).toBeOneOf(["start", "end"]);
    if (what === "start") holds.delete(Number(slot));
    else holds.set(Number(slot), state.join(" "));
  }
}

/** What is in the file, slot by slot; throws when a block is not whole. */
function readBack(path: string): { holds: Map<number, string>; corrupt: number } {
  const { disk, store } = openRealStore(device, path);
  const { blocks } = store.scan();
  const memory = device.allocHost(WRITER_SLOT_BYTES);
  const holds = new Map<number, string>();
  let corrupt = 0;
  for (const { slot, depth } of blocks) {
    store.read(slot, memory.address, 0);
    let events = store.poll(0);
    for (; events.length === 0; events = store.poll(0)) device.wait(100_000);
    if (events[0]!.outcome !== "ok") {
      corrupt++;
      continue;
    }
    const content = new Uint8Array(memory.bytes);
    const [number, version] = new Uint32Array(memory.bytes, 0, 2);
    expect(number).toBe(depth);
    expect(Buffer.compare(content, writerContent(number!, version!))).toBe(0);
    holds.set(slot, `holds ${number} ${version}`);
  }
  device.freeHost(memory.address);
  disk.close(10_000_000);
  return { holds, corrupt };
}

const seed = testSeed();
test(`kill -9, ${ROUNDS} times (SEED=${seed})`, async () => {
  const random = new SeededRandom(seed);
  const path = join(folder, "cache");
  const said = new Map<number, string>();
  let interrupted = 0;
  for (let round = 0; round < ROUNDS; round++) {
    follow(await writeAndKill(path, 1 + round * 1_000_000, random.integer(1, LINES_MAX)), said);
    const { holds, corrupt } = readBack(path);
    expect(corrupt).toBe(0);
    interrupted += WRITER_SLOTS - said.size;
    const numbers = new Set([...holds.values()].map((hold) => hold.split(" ")[1]));
    for (const [slot, hold] of said) {
      if (hold === "erased") expect([slot, holds.get(slot)]).toEqual([slot, undefined]);
      // An older copy of a block that was written twice is dropped at the restart.
      else if (holds.has(slot) || !numbers.has(hold.split(" ")[1])) {
        expect([slot, holds.get(slot)]).toEqual([slot, hold]);
      }
    }
    said.clear();
    for (let slot = 0; slot < WRITER_SLOTS; slot++) said.set(slot, holds.get(slot) ?? "erased");
  }
  expect(interrupted).toBeGreaterThan(0);
}, 120_000);
