// Ids and text both ways, against the reference tokenizer, and characters that are split over tokens.

import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, renameSync } from "node:fs";
import { loadChatTemplate } from "../../../sidecar/model/chat-template.ts";
import { readTensor, SafetensorsFile } from "../../../sidecar/model/safetensors.ts";
import { loadTokenizer, Tokenizer } from "../../../sidecar/model/tokenizer.ts";
import { ModelDirectory } from "../../support/model-directory.ts";
import { readRecall, type RecallItem } from "../../support/recall.ts";

const BUNDLED = "sidecar/models/kvasir-15m-chat";
const bundled = new Tokenizer(BUNDLED);
afterAll(() => bundled.close());

const SAMPLES = [
  "It's 12:30, isn't it?  Yes.\n",
  "naïve café — “quotes” … ½",
  "日本語のテキスト and 한국어, עברית, العربية",
  "👩‍👩‍👧‍👦 🏳️‍🌈 family and flags",
  "tabs\tand\r\nlines\n\n\n   spaces   ",
  "\u0000 control \u001b[0m \ufeff bom",
];

/** What a stream shows after each token. */
function stream(tokenizer: Tokenizer, ids: Iterable<number>): string[] {
  const detokenizer = tokenizer.detokenizer();
  return [...ids].map((id) => detokenizer.push(id));
}

/** A sentencepiece-like BPE with byte fallback, in the spelling of Llama 2's tokenizer.json. */
function byteFallbackModel(decoder: object): object {
  const words = ["<unk>", "<s>", "</s>"];
  for (let byte = 0; byte < 256; byte++) {
    words.push(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  }
  words.push("▁", "h", "i", "▁h", "▁hi");
  return {
    added_tokens: ["<unk>", "<s>", "</s>"].map((content, id) => ({
      id, content, special: true, normalized: false, single_word: false, lstrip: false, rstrip: false,
    })),
    normalizer: { type: "Replace", pattern: { String: " " }, content: "▁" },
    pre_tokenizer: null,
    post_processor: null,
    decoder,
    model: {
      type: "BPE",
      vocab: Object.fromEntries(words.map((word, id) => [word, id])),
      merges: ["▁ h", "▁h i"],
      unk_token: "<unk>",
      byte_fallback: true,
      fuse_unk: true,
    },
  };
}

const LLAMA2_DECODER = {
  type: "Sequence",
  decoders: [
    { type: "Replace", pattern: { String: "▁" }, content: " " },
    { type: "ByteFallback" },
    { type: "Fuse" },
    { type: "Strip", content: " ", start: 1, stop: 0 },
  ],
};

describe("a byte-level tokenizer", () => {
  for (const sample of SAMPLES) {
    test(`gives ${JSON.stringify(sample)} back`, () => {
      expect(bundled.decode(bundled.encode(sample))).toBe(sample);
    });
  }

  test("streams only whole characters, whatever the text", () => {
    for (const sample of SAMPLES) {
      const pieces = stream(bundled, bundled.encode(sample));
      expect(pieces.join("")).toBe(sample);
      for (const piece of pieces) {
        expect(piece.isWellFormed()).toBe(true);
        expect(piece).not.toContain("\ufffd");
      }
    }
  });

  test("never shows the start of a character that does not come", () => {
    const ids = bundled.encode("ok 😀");
    expect(bundled.decode(ids.subarray(0, -1))).toBe("ok ");
  });

  test("shows bytes that are no text as the replacement character, and goes on", () => {
    // The first token of this character holds only a part of its bytes.
    const [lead] = bundled.encode("😀");
    expect(bundled.tokenBytes(lead!).length).toBeLessThan(4);
    expect(bundled.decode([lead!, ...bundled.encode("a")])).toBe("\ufffda");
  });

  test("leaves special tokens out of the text, and takes them up in a prompt", () => {
    const ids = bundled.encode("<|user|>Hi<|end|>");
    expect([ids[0], ids.at(-1)]).toEqual([4, 2]);
    expect(bundled.decode(ids)).toBe("Hi");
    expect(bundled.isSpecial(2)).toBe(true);
    expect(bundled.specialText(2)).toBe("<|end|>");
    expect(bundled.specialText(100)).toBeNull();
    expect(bundled.specialTokens.get("<|assistant|>")).toBe(5);
  });

  test("names the bytes of each token, so that a text is the bytes of its tokens", () => {
    const text = SAMPLES.join("");
    const bytes = Buffer.concat(Array.from(bundled.encode(text), (id) => bundled.tokenBytes(id)));
    expect(bytes.equals(Buffer.from(text))).toBe(true);
    expect(bundled.tokenBytes(1_000_000)).toHaveLength(0);
  });

  test("finds the ids of the reference tokenizer in real conversations", async () => {
    const template = await loadChatTemplate(BUNDLED);
    const encode = ({ messages }: RecallItem): Int32Array =>
      bundled.encode(template.render(messages, { addGenerationPrompt: true }));
    const items = readRecall();
    for (const item of items.filter((_, index) => index % 12 === 0)) {
      expect(encode(item)).toHaveLength(item.tokens);
    }
    const golden = new SafetensorsFile(`${BUNDLED}/eval/golden.safetensors`);
    const expected = readTensor(golden, golden.tensors.get("4.input_ids")!);
    golden.close();
    const sameLength = items.filter(({ tokens }) => tokens === expected.length);
    expect(sameLength.map((item) => encode(item))).toContainEqual(expected as Int32Array);
  });

  test("encodes nothing as nothing", () => {
    expect(bundled.encode("")).toHaveLength(0);
  });

  test("encodes long texts in its worker to the same ids", async () => {
    const long = SAMPLES.join(" ").repeat(40);
    expect(long.length).toBeGreaterThan(4000);
    const [first, second] = await Promise.all([bundled.encodeAsync(long), bundled.encodeAsync(`${long}!`)]);
    expect(first).toEqual(bundled.encode(long));
    expect(second).toEqual(bundled.encode(`${long}!`));
  });

  test("that is closed fails the texts it still has to encode", async () => {
    const tokenizer = await loadTokenizer(BUNDLED);
    const waiting = tokenizer.encodeAsync("word ".repeat(10_000));
    tokenizer.close();
    expect(waiting).rejects.toThrow("the tokenizer was closed");
    await waiting.catch(() => null);
  });
});

describe("a tokenizer whose worker fails", () => {
  test("fails the text, and works again with the next", async () => {
    using directory = new ModelDirectory({ "tokenizer.json": readFileSync(`${BUNDLED}/tokenizer.json`) });
    const tokenizer = new Tokenizer(directory.path);
    const long = "word ".repeat(1000);
    const path = directory.file("tokenizer.json");
    renameSync(path, `${path}.away`);
    const error = await tokenizer.encodeAsync(long).catch((reason: unknown) => reason);
    expect((error as Error).message).toContain("the tokenizer worker failed");
    renameSync(`${path}.away`, path);
    expect(await tokenizer.encodeAsync(long)).toEqual(tokenizer.encode(long));
    tokenizer.close();
  });
});

describe("a sentencepiece tokenizer with byte fallback", () => {
  using directory = new ModelDirectory({ "tokenizer.json": byteFallbackModel(LLAMA2_DECODER) });
  const tokenizer = new Tokenizer(directory.path);

  test("keeps the space of an answer's words", () => {
    expect(tokenizer.decode(tokenizer.encode("hi hi"))).toBe("hi hi");
    expect(stream(tokenizer, tokenizer.encode(" hi hi"))).toEqual([" hi", " hi"]);
  });

  test("joins the bytes of characters that it has no token for", () => {
    const ids = tokenizer.encode("hi 😀é");
    expect(tokenizer.decode(ids)).toBe("hi 😀é");
    for (const piece of stream(tokenizer, ids)) expect(piece).not.toContain("\ufffd");
  });

  test("does not take its end token for text", () => {
    expect(tokenizer.decode(tokenizer.encode("hi</s>"))).toBe("hi");
  });
});

describe("a tokenizer that cannot be used", () => {
  test("is named when it is missing", async () => {
    using directory = new ModelDirectory();
    const error = await loadTokenizer(directory.path).catch((reason: unknown) => reason);
    expect((error as Error).message).toContain("tokenizer.json: cannot be read");
  });

  test("is named when its decoder does not join tokens", () => {
    using directory = new ModelDirectory({ "tokenizer.json": byteFallbackModel({ type: "CTC" }) });
    expect(() => new Tokenizer(directory.path)).toThrow('tokenizer.json: decoder: "CTC" is not supported');
  });

  test("is named when the library does not know its parts", () => {
    const model = { ...byteFallbackModel(LLAMA2_DECODER), pre_tokenizer: { type: "Nonsense" } };
    using directory = new ModelDirectory({ "tokenizer.json": model });
    expect(() => new Tokenizer(directory.path)).toThrow("tokenizer.json: cannot be used");
  });
});
