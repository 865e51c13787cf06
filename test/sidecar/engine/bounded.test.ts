// Conversations that together are ten times as large as all tiers, for some thousand turns: memory and disk stay as
// they were, and whatever is lost is counted with its reason.

import { afterAll, expect, test } from "bun:test";
import { heapStats } from "bun:jsc";
import { mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { diskPathOf, ModelEngine } from "../../support/model-engine.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const BLOCK_TOKENS = 8;
const TIERS = { gpuBlocks: 24, hostBlocks: 40, diskBlocks: 96 };
const TALK_TOKENS = 80;
/** Ten times what the tiers hold together. */
const TALKS = (10 * (TIERS.gpuBlocks + TIERS.hostBlocks + TIERS.diskBlocks) * BLOCK_TOKENS) / TALK_TOKENS;
const TURNS = 2000;
/** By then every talk has its length, and all pools are full. */
const WARM_UP_TURNS = 800;
/** What the heap may grow by: each lost block is remembered, up to a limit. */
const GROWTH_BYTES_MAX = 8 * 2 ** 20;

const folder = mkdtempSync(join(tmpdir(), "kvasir-bounded-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** The heap and its buffers. Resident memory also counts what other tests left to the allocator. */
function memoryBytes(): number {
  Bun.gc(true);
  const { heapSize, extraMemorySize } = heapStats();
  return heapSize + extraMemorySize;
}

const seed = testSeed();
test.each(["inclusive", "exclusive"] as const)(`%s tiers (SEED=${seed})`, async (tiers) => {
  const data = mkdtempSync(join(folder, "data-"));
  const model = join(import.meta.dir, "../../golden/models/qwen3-qknorm");
  const engine = await ModelEngine.open({
    model, data, blockTokens: BLOCK_TOKENS, maxModelLen: 128, ...TIERS, cache: { tiers, diskIdleMs: 5 },
  });
  const random = new SeededRandom(seed);
  const text = (length: number) => Array.from({ length }, () => random.integer(6, 500));
  const talks = Array.from({ length: TALKS }, () => text(TALK_TOKENS - 30));
  const { residency, moves } = engine.cache;
  const fileBytes = statSync(diskPathOf(data)).size;
  const limit = TIERS.gpuBlocks + residency.tiers.host!.pool.blockCount + residency.tiers.disk!.pool.blockCount;
  let bytesBefore = 0;
  const served = { gpu: 0, host: 0, disk: 0 };
  for (let turn = 0; turn < TURNS; turn++) {
    if (turn === WARM_UP_TURNS) bytesBefore = memoryBytes();
    // A few talks are in everybody's mouth; the others come back once in a while.
    const talk = talks[Math.floor(TALKS * random.next() ** 3)]!;
    const { finish } = engine.ask([...talk, ...text(4)], { maxTokens: 3 });
    if (finish.tokens.length < TALK_TOKENS) talk.push(...finish.tokens.subarray(talk.length));
    for (const tier of ["gpu", "host", "disk"] as const) served[tier] += finish.usage.cachedTokens[tier];
    engine.answers.clear();
    expect(residency.index.size).toBeLessThanOrEqual(limit);
  }
  engine.quiet();
  const growth = memoryBytes() - bytesBefore;
  const lost = Object.fromEntries(residency.lost.counts);
  const mebibytes = (bytes: number) => (bytes / 2 ** 20).toFixed(1);
  console.log(
    `${tiers}: ${TALKS} talks, ${TURNS} turns; tokens served ${JSON.stringify(served)}, ` +
      `blocks lost ${JSON.stringify(lost)}; file ${fileBytes} bytes; memory ${mebibytes(bytesBefore)} MiB, ` +
      `after ${TURNS - WARM_UP_TURNS} turns more ${mebibytes(bytesBefore + growth)} MiB`,
  );
  expect(Math.min(served.gpu, served.host, served.disk)).toBeGreaterThan(0);
  expect(lost["evicted"]).toBeGreaterThan(0);
  expect(statSync(diskPathOf(data)).size).toBe(fileBytes);
  expect(growth).toBeLessThan(GROWTH_BYTES_MAX);
  expect(moves.inFlight).toBe(0);
  expect(engine.cache.availableBlocks).toBe(TIERS.gpuBlocks);
  engine.cache.checkInvariants();
  engine.close();
});
