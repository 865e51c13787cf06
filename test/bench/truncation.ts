// What a full context window costs: the bundled model reads long texts that overflow its window again and again, with
// the KV of what is kept reused at new positions (ours), computed again from the kept tokens, or reused with keys that
// stay at their old absolute positions (the negative control).
//
//   bun run test/bench/truncation.ts [--windows 2048,512] [--keep 1,0] [--tokens 205000] [--control-every 4]
//     [--threads 2] [--json FILE]

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { loadChatTemplate, type TemplateMessage } from "../../sidecar/model/chat-template.ts";
import { loadTokenizer } from "../../sidecar/model/tokenizer.ts";
import { BUNDLED_MODEL } from "../support/recall.ts";
import { TestModel } from "../support/test-model.ts";
import { benchOptions } from "./bench-options.ts";
import { mean, meanInterval } from "./statistics.ts";
import { type Segment, TruncatedReader } from "./truncated-views.ts";

const values = benchOptions(import.meta.path, {
  windows: { type: "string", default: "2048,512" },
  keep: { type: "string", default: "1,0" },
  tokens: { type: "string", default: "205000" },
  "control-every": { type: "string", default: "4" },
  threads: { type: "string", default: "2" },
  json: { type: "string" },
});
const BLOCK_TOKENS = 64;
const RATIO = 0.5;
/** Tokens right behind a drop, where what was lost shows most. */
const NEAR = 128;
/** Of the control's turned keys, in nats: they are rounded to bf16 once more. */
const TURNING_ERROR_MAX = 0.005;

interface Text {
  readonly name: string;
  readonly tokens: Int32Array;
}

interface Result {
  readonly window: number;
  readonly keepBlocks: number;
  readonly text: string;
  readonly segments: number;
  readonly tokens: number;
  /** Nats per token. */
  readonly kept: number;
  readonly recomputed: number;
  readonly difference: number;
  readonly interval: readonly [number, number];
  /** Of the first NEAR tokens behind each drop. */
  readonly nearDifference: number;
  readonly nearInterval: readonly [number, number];
  readonly control: number;
  /** Perplexity of the control over that of recomputing, on the segments that it read. */
  readonly controlRatio: number;
}

function readEval(name: string): string {
  return gunzipSync(readFileSync(join(BUNDLED_MODEL, "eval", name))).toString();
}

/** Long texts that the model was not trained on. */
async function readTexts(): Promise<{ prose: Int32Array; chats: Int32Array }> {
  const [tokenizer, template] = [await loadTokenizer(BUNDLED_MODEL), await loadChatTemplate(BUNDLED_MODEL)];
  const lines = readEval("chats.jsonl.gz").trimEnd().split("\n");
  const chats = lines.map((line) => {
    const { messages } = JSON.parse(line) as { messages: TemplateMessage[] };
    return template.render(messages, { addGenerationPrompt: false });
  });
  return { prose: tokenizer.encode(readEval("prose.txt.gz")), chats: tokenizer.encode(chats.join("")) };
}

/** Enough text for `count` tokens behind drops; what is read again is cut at other places. */
function textsOf(count: number, window: number, { prose, chats }: { prose: Int32Array; chats: Int32Array }): Text[] {
  const texts: Text[] = [];
  let left = count;
  for (let pass = 0; left > 0; pass++) {
    const skipped = Math.floor(window * RATIO * (1 - 2 ** -pass));
    const suffix = pass === 0 ? "" : ` from token ${skipped}`;
    for (const [name, tokens] of [["prose", prose], ["chats", chats]] as const) {
      if (left <= 0) break;
      const text = tokens.subarray(skipped, skipped + window + left + window * RATIO);
      texts.push({ name: name + suffix, tokens: text });
      left -= text.length - window;
    }
  }
  return texts;
}

function summarize(window: number, keepBlocks: number, text: string, segments: readonly Segment[]): Result {
  const differences = segments.map(({ kept, recomputed }) => mean(kept) - mean(recomputed));
  const near = segments.map(
    ({ kept, recomputed }) => mean(kept.subarray(0, NEAR)) - mean(recomputed.subarray(0, NEAR)),
  );
  const controlled = segments.filter(({ control }) => control !== null);
  const control = mean(controlled.map((segment) => mean(segment.control!)));
  return {
    window,
    keepBlocks,
    text,
    segments: segments.length,
    tokens: segments.reduce((sum, { kept }) => sum + kept.length, 0),
    kept: mean(segments.map(({ kept }) => mean(kept))),
    recomputed: mean(segments.map(({ recomputed }) => mean(recomputed))),
    difference: mean(differences),
    interval: meanInterval(differences),
    nearDifference: mean(near),
    nearInterval: meanInterval(near),
    control,
    controlRatio: Math.exp(control - mean(controlled.map(({ recomputed }) => mean(recomputed)))),
  };
}

const signed = (value: number): string => (value < 0 ? "" : "+") + value.toFixed(4);

function row(result: Result): string {
  const [low, high] = result.interval;
  const [nearLow, nearHigh] = result.nearInterval;
  const cells = [
    result.window, result.keepBlocks, result.text, result.segments, result.tokens, result.kept.toFixed(4),
    result.recomputed.toFixed(4), `${signed(result.difference)} (${signed(low)} to ${signed(high)})`,
    `${signed(result.nearDifference)} (${signed(nearLow)} to ${signed(nearHigh)})`,
    `${result.control.toFixed(3)} (${result.controlRatio.toFixed(2)}x)`,
  ];
  return `| ${cells.join(" | ")} |`;
}

const sources = await readTexts();
console.log(`prose: ${sources.prose.length} tokens, chats: ${sources.chats.length} tokens; blocks of ${BLOCK_TOKENS}`);
console.log(
  "| window | kept blocks | text | drops | tokens behind them | nats, KV kept | nats, recomputed | " +
    `difference (95 %) | first ${NEAR} tokens behind a drop | old positions: nats (perplexity) |`,
);
console.log(`|${" --- |".repeat(10)}`);
const results: Result[] = [];
for (const window of values.windows.split(",").map(Number)) {
  using model = await TestModel.load(BUNDLED_MODEL, {
    blockTokens: BLOCK_TOKENS, maxModelLen: window, kvDtype: "bf16", threads: Number(values.threads),
  });
  for (const keepBlocks of values.keep.split(",").map(Number)) {
    const rule = { blockTokens: BLOCK_TOKENS, maxTokens: window, keepBlocks, ratio: RATIO };
    using reader = new TruncatedReader(model, rule);
    const error = reader.checkTurning(sources.prose);
    if (error > TURNING_ERROR_MAX) throw new Error(`turned keys are wrong: ${error} nats apart`);
    const all: Segment[] = [];
    for (const { name, tokens } of textsOf(Number(values.tokens), window, sources)) {
      const segments = [...reader.read(tokens, Number(values["control-every"]))];
      all.push(...segments);
      results.push(summarize(window, keepBlocks, name, segments));
      console.log(row(results.at(-1)!));
    }
    results.push(summarize(window, keepBlocks, "all", all));
    console.log(row(results.at(-1)!));
  }
}
if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(results, null, 2)}\n`);
