// Tokens to text: whole characters, honest counts, and lineages only where text and ids agree.

import { describe, expect, test } from "bun:test";
import { Completion } from "../../sidecar/completion.ts";
import type { FinishEvent, TokenEvent } from "../../sidecar/engine/request.ts";
import type { FinishReason, SubmitRequest } from "../../sidecar/protocol.ts";
import { cacheReport } from "../support/cache-report.ts";
import { byteToken, END, fakeTokenizer, modelIds, START } from "../support/fake-tokenizer.ts";
import { SeededRandom, testSeed } from "../support/seeded-random.ts";
import { submitRequest } from "../support/submit-request.ts";

const PROMPT = [START, byteToken(112)];

function completion(sampling: Partial<SubmitRequest["sampling"]> = {}): Completion {
  const made = new Completion(5, submitRequest({ sampling }), fakeTokenizer());
  made.promptText = "<start>p";
  return made;
}

function token(id: number, choice = 0, logprob = -0.5, top: TokenEvent["top"] = []): TokenEvent {
  return { type: "token", request: 1, choice, token: id, logprob, top };
}

function finish(ids: readonly number[], reason: FinishReason = "length", choice = 0): FinishEvent {
  return {
    type: "finish",
    request: 1,
    choice,
    reason,
    usage: {
      promptTokens: PROMPT.length,
      completionTokens: ids.length,
      cachedTokens: { gpu: 1, host: 0, disk: 0 },
    },
    timings: { queueMs: 1, loadMs: 0, prefillMs: 2, ttftMs: 3, totalMs: 10 + choice },
    cache: cacheReport(),
    missReasons: { absent: 1 },
    tokens: Int32Array.from([...PROMPT, ...ids]),
    blockIds: [],
  };
}

function lineages(made: Completion): { text: string; tokens: Int32Array }[] {
  return [...made.remains()].flatMap(({ lineage }) => lineage ?? []);
}

/** All of it at once; the text of choice 0. */
function run(ids: readonly number[], made: Completion, reason: FinishReason = "length"): string {
  const shown = reason === "stop" ? ids.slice(0, -1) : ids;
  for (const id of shown) made.apply(token(id));
  made.apply(finish(ids, reason));
  return made.takeDeltas().map(([, , text]) => text).join("");
}

describe("Completion", () => {
  test("sends a character once it is whole, and counts tokens that brought no text", () => {
    const made = completion();
    const sent: unknown[] = [];
    for (const byte of Buffer.from("é🙂")) {
      made.apply(token(byteToken(byte)));
      sent.push(...made.takeDeltas().map(([, , text, count]) => [text, count]));
    }
    expect(sent).toEqual([["", 1], ["é", 1], ["", 1], ["", 1], ["", 1], ["🙂", 1]]);
    expect(made.takeDeltas()).toEqual([]);
  });

  test("merges what was not taken", () => {
    const made = completion({ logprobs: 0 });
    for (const id of modelIds("abc", () => false)) made.apply(token(id));
    const [delta, ...none] = made.takeDeltas();
    expect(none).toEqual([]);
    expect(delta!.slice(0, 4)).toEqual([5, 0, "abc", 3]);
    expect(delta![4]!.map((each) => each.token)).toEqual(["a", "b", "c"]);
  });

  test("a stop string ends the choice, cuts the text, and what follows is not counted", () => {
    const made = completion({ stop: ["\n\n"] });
    const ids = modelIds("ok\n\nmore", () => false);
    const updates = ids.map((id) => made.apply(token(id)));
    expect(updates.map((update) => update.stoppedChoice)).toEqual([null, null, null, 0, null, null, null, null]);
    expect(made.apply(finish(ids, "stop"))).toEqual({ stoppedChoice: null, isDone: true });
    expect(made.takeDeltas()).toEqual([[5, 0, "ok", 4, null]]);
    expect(made.done()).toMatchObject({ tokenCount: 4, finishReasons: ["stop"], usage: { completionTokens: 4 } });
    expect(lineages(made)).toEqual([]);
  });

  test("a stop string in the very last token is a stop, though the engine ended by length", () => {
    const made = completion({ stop: ["b"] });
    const ids = modelIds("ab", () => false);
    for (const id of ids) made.apply(token(id));
    made.apply(finish(ids, "length"));
    expect(made.done().finishReasons).toEqual(["stop"]);
    expect(made.takeDeltas()[0]![2]).toBe("a");
  });

  test("what was held back for a stop string comes with the end", () => {
    expect(run(modelIds("tail E", () => false), completion({ stop: ["END"] }))).toBe("tail E");
  });

  test("an end token is counted as completion, but is not a token of the stream", () => {
    const made = completion();
    expect(run([...modelIds("hi", () => false), END], made, "stop")).toBe("hi");
    expect(made.done()).toMatchObject({ tokenCount: 2, usage: { completionTokens: 3, promptTokens: 2 } });
  });

  test("is done when all its choices are, and reports each", () => {
    const made = completion({ n: 2 });
    made.apply(token(byteToken(97), 0));
    made.apply(token(byteToken(98), 1));
    made.apply(token(byteToken(99), 1));
    expect(made.apply(finish([byteToken(98), byteToken(99)], "length", 1)).isDone).toBe(false);
    expect(made.apply(finish([byteToken(97)], "abort", 0)).isDone).toBe(true);
    expect(made.takeDeltas().map(([, choice, text]) => [choice, text])).toEqual([[0, "a"], [1, "bc"]]);
    const done = made.done();
    expect(done.finishReasons).toEqual(["abort", "length"]);
    expect(done.usage).toEqual({ promptTokens: 2, completionTokens: 3, cachedTokens: { gpu: 1, host: 0, disk: 0 } });
    expect(done.timings.totalMs).toBe(11);
    expect(done.tokenCount).toBe(3);
  });

  test("logprobs carry text and bytes, and a number where the model says never", () => {
    const made = completion({ logprobs: 1 });
    made.apply(token(byteToken(0xc3), 0, -Infinity, [{ id: byteToken(97), logprob: -0.25 }]));
    expect(made.takeDeltas()[0]![4]).toEqual([
      { token: "\ufffd", bytes: [0xc3], logprob: -9999, top: [{ token: "a", bytes: [97], logprob: -0.25 }] },
    ]);
  });

  test("remembers an answer with its ids and its end token", () => {
    const made = completion();
    const ids = [...modelIds("hi!", () => true), END];
    run(ids, made, "stop");
    const [lineage] = lineages(made);
    expect(lineage!.text).toBe("<start>phi!<end>");
    expect(Array.from(lineage!.tokens)).toEqual([...PROMPT, ...ids]);
  });

  test("remembers nothing when the answer's ids say more than its text", () => {
    const cut = completion();
    run(modelIds(Buffer.from("ab🙂").subarray(0, 4), () => false), cut);
    expect(lineages(cut)).toEqual([]);
    const special = completion();
    run([byteToken(97), START, byteToken(98)], special);
    expect(lineages(special)).toEqual([]);
    const aborted = completion();
    run([byteToken(97)], aborted, "abort");
    expect(lineages(aborted)).toEqual([]);
  });

  const seed = testSeed();
  test(`text and counts add up whatever is taken when (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    for (let round = 0; round < 200; round++) {
      const text = Array.from({ length: random.integer(0, 20) }, () => "aé🙂\n"[random.integer(0, 4)] ?? "z").join("");
      const valid = Buffer.from(text).toString();
      const ids = modelIds(valid, () => random.next() < 0.5);
      const made = completion();
      let received = "";
      let count = 0;
      const take = () => {
        for (const [, , piece, tokens] of made.takeDeltas()) {
          received += piece;
          count += tokens;
        }
      };
      for (const id of ids) {
        made.apply(token(id));
        if (random.next() < 0.5) take();
      }
      made.apply(finish(ids));
      take();
      expect(received).toBe(valid);
      expect(count).toBe(made.done().tokenCount);
      expect(lineages(made).map((lineage) => lineage.text)).toEqual([`<start>p${valid}`]);
    }
  });
});
