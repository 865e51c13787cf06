// Real models on the CPU library, through the whole engine: wherever a conversation's blocks have been meanwhile, in
// gpu or host memory, on disk, in an earlier process, and however its view was cut, each token is chosen from logits
// that equal, bit for bit, those of a run that never lost anything.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Answer, ModelEngine, type ModelEngineOptions } from "../../support/model-engine.ts";
import { liveAndDie } from "../../support/model-engine-process.ts";
import { BUNDLED_MODEL } from "../../support/recall.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";
import { TestModel } from "../../support/test-model.ts";

const GOLDEN_MODELS = join(import.meta.dir, "../../golden/models");
const MODELS = {
  "kvasir-15m-chat": BUNDLED_MODEL,
  "llama3-gqa": join(GOLDEN_MODELS, "llama3-gqa"),
  "qwen3-qknorm": join(GOLDEN_MODELS, "qwen3-qknorm"),
  "mistral-swa": join(GOLDEN_MODELS, "mistral-swa"),
};
const BLOCK_SIZES = [8, 64] as const;
const TIER_MODES = ["inclusive", "exclusive"] as const;
/** The larger model takes longer: two of the four combinations. */
const BUNDLED_TIER_MODES = { 8: ["exclusive"], 64: ["inclusive"] } as const;
const VOCAB = 512;
const WINDOW = 256;

/** Tokens of one client; no two seeds begin alike. */
function text(length: number, seed: number): number[] {
  const random = new SeededRandom(seed);
  return Array.from({ length }, () => random.integer(6, VOCAB - 1));
}

function expectSame(actual: Answer, expected: Answer): void {
  // Where they differ, what the cache did says where to look.
  const { usage, cache, missReasons } = actual.finish ?? {};
  const story = JSON.stringify({ usage, cache, missReasons });
  expect(actual.tokens, story).toEqual(expected.tokens);
  expect(actual.logits.map(String), story).toEqual(expected.logits.map(String));
}

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "kvasir-exact-"));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** An engine that has room for everything and keeps it. */
class Reference {
  readonly #answers = new Map<string, Answer>();
  #accountCount = 0;

  private constructor(readonly engine: ModelEngine) {}

  static async open(options: Pick<ModelEngineOptions, "model" | "blockTokens">): Promise<Reference> {
    const gpuBlocks = Math.ceil(20_000 / options.blockTokens!);
    return new Reference(await ModelEngine.open({ ...options, data: folder, maxModelLen: WINDOW, gpuBlocks }));
  }

  /** The turn of a conversation that was never evicted. */
  resident(tokens: readonly number[], maxTokens: number): Answer {
    const key = `${maxTokens} ${tokens.join()}`;
    const answer = this.#answers.get(key) ?? this.engine.ask(tokens, { maxTokens });
    this.#answers.set(key, answer);
    return answer;
  }

  /** For an account of its own: everything is computed. */
  afresh(tokens: readonly number[], maxTokens: number): Answer {
    const salt = new Uint8Array(32).fill(++this.#accountCount);
    const answer = this.engine.ask(tokens, { maxTokens, salt });
    expect(answer.finish.usage.cachedTokens).toEqual({ gpu: 0, host: 0, disk: 0 });
    return answer;
  }
}

for (const [name, model] of Object.entries(MODELS)) {
  describe.each([...BLOCK_SIZES])(`${name}, blocks of %i`, (blockTokens) => {
    let reference: Reference;
    beforeAll(async () => {
      reference = await Reference.open({ model, blockTokens });
    });
    afterAll(() => reference.engine.close());

    test("a resident conversation equals one computed at once", () => {
      let tokens: readonly number[] = [];
      for (let turn = 0; turn < 3; turn++) {
        const prompt = [...tokens, ...text(50, turn)];
        const answer = reference.engine.ask(prompt, { maxTokens: 20 });
        if (turn > 0) expect(answer.finish.usage.cachedTokens.gpu).toBe(tokens.length - 1);
        expectSame(answer, reference.afresh(prompt, 20));
        tokens = [...answer.finish.tokens];
      }
    });

    // That this operation is what the reference implementation gives is shown in test/golden/families.test.ts.
    test("a view that has dropped blocks equals a block table without them", async () => {
      const answer = reference.engine.ask(text(100, 20), { maxTokens: 300 });
      const { windowTokens, dropTokens, dropBlocks, keepBlocks } = reference.engine.cache.rule;
      const tokens = answer.finish.tokens.subarray(0, -1);
      expect(answer.finish.cache.droppedTokens).toBe(2 * dropTokens);
      const kvDtype = reference.engine.model.device.config.kvDtype as "bf16";
      using byHand = await TestModel.load(model, { blockTokens, maxModelLen: WINDOW, kvDtype });
      const sequence = byHand.sequence();
      const hashes: string[] = [];
      for (let at = 0; at < tokens.length; ) {
        if (sequence.position === windowTokens) {
          sequence.table.splice(keepBlocks, dropBlocks);
          sequence.position -= dropTokens;
        }
        const ids = tokens.subarray(at, at + Math.min(40, windowTokens - sequence.position));
        const [logits] = byHand.step([{ sequence, ids }]);
        const { vocabSize } = byHand.model.config;
        for (let i = 0; i < ids.length; i++) {
          const row = logits!.subarray(i * vocabSize, (i + 1) * vocabSize);
          hashes.push(String(Bun.hash.xxHash64(new Uint8Array(row.buffer, row.byteOffset, row.byteLength))));
        }
        at += ids.length;
      }
      expect(answer.logits.map(String)).toEqual(hashes.slice(99));
    });

    const modes = model === BUNDLED_MODEL ? BUNDLED_TIER_MODES[blockTokens] : TIER_MODES;
    describe.each([...modes])("%s tiers", (tiers) => {
      /** One conversation of full length and little more. */
      const gpuBlocks = Math.ceil((WINDOW + 1) / blockTokens) + 1;
      const blocksOf = (tokens: number) => Math.ceil(tokens / blockTokens);
      let data: string;
      let isFirst = true;

      function open(changes: Partial<ModelEngineOptions> = {}): Promise<ModelEngine> {
        return ModelEngine.open({ ...options(), ...changes });
      }

      function options(): ModelEngineOptions {
        return {
          model, data, blockTokens, gpuBlocks, maxModelLen: WINDOW, hostBlocks: blocksOf(1200),
          diskBlocks: blocksOf(4000), cache: { tiers },
        };
      }

      /** Other conversations come and go, until none of what was there is left in gpu memory. */
      function crowd(engine: ModelEngine): void {
        for (const seed of [101, 102]) engine.ask(text(220, seed), { maxTokens: 16 });
      }

      /** The last turn of a conversation of two, and what is known about the first. */
      function converse(engine: ModelEngine, seed: number) {
        const answer = engine.ask(text(130, seed), { maxTokens: 30 });
        expectSame(answer, reference.resident(text(130, seed), 30));
        const known = answer.finish.tokens.length - 1;
        return { known, next: [...answer.finish.tokens, ...text(20, seed + 1000)] };
      }

      /** Asks the next turn, which must equal the reference's; where its tokens came from. */
      function served(engine: ModelEngine, next: readonly number[]) {
        const answer = engine.ask(next, { maxTokens: 30 });
        expectSame(answer, reference.resident(next, 30));
        if (isFirst) expectSame(answer, reference.afresh(next, 30));
        isFirst = false;
        return answer.finish.usage.cachedTokens;
      }

      beforeAll(() => {
        data = mkdtempSync(join(folder, "data-"));
      });

      test("from gpu memory", async () => {
        const engine = await open({ diskBlocks: 0 });
        const { known, next } = converse(engine, 1);
        expect(served(engine, next)).toEqual({ gpu: known, host: 0, disk: 0 });
        engine.close();
      });

      test("from host memory", async () => {
        const engine = await open({ diskBlocks: 0 });
        const { known, next } = converse(engine, 2);
        crowd(engine);
        expect(served(engine, next)).toEqual({ gpu: 0, host: known, disk: 0 });
        engine.close();
      });

      test("from disk", async () => {
        const engine = await open({ hostBlocks: blocksOf(300) });
        const { known, next } = converse(engine, 3);
        engine.quiet();
        for (let seed = 110; seed < 114; seed++) {
          engine.ask(text(220, seed), { maxTokens: 16 });
          engine.quiet();
        }
        const { gpu, disk } = served(engine, next);
        expect(gpu).toBe(0);
        expect(disk).toBeGreaterThanOrEqual(known - blockTokens);
        engine.close();
      });

      test("after an orderly stop, from disk, and from host memory where it was kept", async () => {
        const first = await open();
        const { known, next } = converse(first, 4);
        first.close();
        const second = await open();
        expect(served(second, next)).toEqual({ gpu: 0, host: 0, disk: known });
        crowd(second);
        second.close(true);
        const third = await open();
        const { gpu, host, disk } = served(third, next);
        expect([gpu, host + disk]).toEqual([0, next.length - 1]);
        expect(host).toBeGreaterThan(0);
        third.close();
      });

      test("after its sequence was preempted", async () => {
        const engine = await open();
        const prompts = [5, 6, 7].map((seed) => text(60, seed));
        const ids = prompts.map((prompt) => engine.submit(prompt, { maxTokens: 130 }));
        engine.runToEnd();
        expect(engine.engine.stats().preemptions).toBeGreaterThan(0);
        ids.forEach((id, i) => expectSame(engine.answer(id), reference.resident(prompts[i]!, 130)));
        engine.close();
      });

      test("forked in the middle of a block, and by several choices", async () => {
        const engine = await open();
        const { next } = converse(engine, 8);
        const fork = [...next.slice(0, 77), ...text(40, 9)];
        expect(served(engine, fork).gpu).toBe(77);
        expect(served(engine, next).gpu).toBeGreaterThan(100);
        crowd(engine);
        const id = engine.submit(next, { maxTokens: 30, choiceCount: 3 });
        engine.runToEnd();
        const alone = reference.resident(next, 30);
        expectSame(engine.answer(id, 0), alone);
        for (const choice of [1, 2]) expect(engine.answer(id, choice).logits[0]).toBe(alone.logits[0]!);
        engine.close();
      });

      test("with a view that has dropped blocks, from every tier", async () => {
        let engine = await open();
        let tokens: readonly number[] = [];
        const total = { gpu: 0, host: 0, disk: 0 };
        for (let turn = 0; turn < 8; turn++) {
          const prompt = [...tokens, ...text(50, 30 + turn)];
          const { finish, ...answer } = engine.ask(prompt, { maxTokens: 20 });
          expectSame({ ...answer, finish }, reference.resident(prompt, 20));
          expect(finish.cache.isViewRestarted).toBe(false);
          // What was cached is what is left of the view, and only what the next turn adds is computed.
          const { gpu, host, disk } = finish.usage.cachedTokens;
          const missing = Object.values(finish.missReasons).reduce((sum, count) => sum + count, 0);
          if (turn > 0) expect(missing).toBeLessThanOrEqual(51);
          if (finish.cache.droppedTokens > 0) {
            total.gpu += gpu;
            total.host += host;
            total.disk += disk;
          }
          tokens = [...finish.tokens];
          if (turn === 5) crowd(engine);
          if (turn === 6) {
            engine.close();
            engine = await open();
          }
        }
        expect(Math.min(...Object.values(total)), JSON.stringify(total)).toBeGreaterThan(blockTokens);
        engine.close();
      });
    });
  });
}

const seed = testSeed();
describe.each([
  ["kvasir-15m-chat", "exclusive"],
  ["qwen3-qknorm", "inclusive"],
] as const)("%s, kill -9", (name, tiers) => {
  const options = {
    model: MODELS[name], blockTokens: 8, gpuBlocks: 34, maxModelLen: WINDOW, hostBlocks: 120, diskBlocks: 400,
    cache: { tiers },
  };
  // The second turn is pushed down by the third, which begins anew; the fourth overflows the window.
  const news = [text(130, 1), text(30, 2), text(40, 3), text(60, 4)];
  let reference: Reference;
  beforeAll(async () => {
    reference = await Reference.open(options);
  });
  afterAll(() => reference.engine.close());

  async function resume(data: string): Promise<{ host: number; disk: number }> {
    const engine = await ModelEngine.open({ ...options, data });
    const prompt = [...reference.engine.converse(news, 20), ...text(9, 5)];
    const answer = engine.ask(prompt, { maxTokens: 20 });
    // A view that lost blocks begins anew, and is exact only with respect to what it still shows.
    if (!answer.finish.cache.isViewRestarted) expectSame(answer, reference.resident(prompt, 20));
    // All of the first turn's tokens lie before the first drop.
    const early = [...news[0]!, ...text(5, 6)];
    expectSame(engine.ask(early, { maxTokens: 5 }), reference.resident(early, 5));
    engine.cache.checkInvariants();
    engine.close();
    return answer.finish.usage.cachedTokens;
  }

  test("once all was quiet: the whole view is served from host memory and disk", async () => {
    const data = mkdtempSync(join(folder, "quiet-"));
    await liveAndDie({ engine: { ...options, data }, news, maxTokens: 20, killAtTurn: null });
    const { host, disk } = await resume(data);
    expect(host + disk).toBeGreaterThan(100);
  });

  test(`at any moment (SEED=${seed})`, async () => {
    const random = new SeededRandom(seed);
    const data = mkdtempSync(join(folder, "any-"));
    for (let round = 0; round < 3; round++) {
      const killAtTurn = random.integer(1, 250);
      await liveAndDie({ engine: { ...options, data }, news, maxTokens: 20, killAtTurn });
      await resume(data);
    }
  });
});
