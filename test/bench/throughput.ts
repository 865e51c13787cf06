// Tokens per second at 1, 8 and 32 streams at once, through the whole path: HTTP clients, an edge on Bun, one sidecar.
// Each stream has a prompt of its own and generates to its limit; a round is measured from its first request to its
// last token, prompts included.
//
//   bun test/bench/throughput.ts [--streams 1,8,32] [--tokens 128] [--words 20] [--rounds 3] [-- sidecar flags]

import { BenchSidecar } from "../support/bench-sidecar.ts";
import { startEdgeProcess } from "../support/edge-process.ts";
import { startPostgres } from "../support/postgres.ts";
import { SeededRandom } from "../support/seeded-random.ts";
import { markdownTable, median } from "../support/table.ts";
import { benchOptions } from "./bench-options.ts";

const split = process.argv.indexOf("--");
const values = benchOptions(import.meta.path, {
  streams: { type: "string", default: "1,8,32" },
  tokens: { type: "string", default: "128" },
  words: { type: "string", default: "20" },
  rounds: { type: "string", default: "3" },
});
const tokenCount = Number(values.tokens);
const WORDS = "the sea was calm and ships came from far away with salt wood cloth and many old stories".split(" ");
const random = new SeededRandom(1);

type Sample = { firstMs: number; totalMs: number; promptTokens: number };

async function one(url: string, model: string): Promise<Sample> {
  const words = Array.from({ length: Number(values.words) }, () => WORDS[random.integer(0, WORDS.length - 1)]);
  const content = words.join(" ");
  const startMs = performance.now();
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      model, messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true },
      max_tokens: tokenCount, ignore_eos: true, temperature: 1,
    }),
  });
  if (!response.ok) throw new Error(await response.text());
  let firstMs = 0;
  let text = "";
  const decoder = new TextDecoder();
  for await (const chunk of response.body!) {
    text += decoder.decode(chunk, { stream: true });
    if (firstMs === 0 && text.includes('"delta":{"content"')) firstMs = performance.now() - startMs;
  }
  const usage = JSON.parse(text.split("\n\n").at(-3)!.slice("data: ".length)).usage;
  if (usage.completion_tokens !== tokenCount) throw new Error(`${usage.completion_tokens} tokens came`);
  return { firstMs, totalMs: performance.now() - startMs, promptTokens: usage.prompt_tokens };
}

async function round(url: string, model: string, streams: number) {
  const startMs = performance.now();
  const samples = await Promise.all(Array.from({ length: streams }, () => one(url, model)));
  const perSecond = (streams * tokenCount) / ((performance.now() - startMs) / 1000);
  return { samples, perSecond };
}

const pg = await startPostgres();
const sidecar = await BenchSidecar.start(split < 0 ? [] : process.argv.slice(split + 1));
const edge = await startEdgeProcess("bun", pg.url, [sidecar.process], ["--log-level", "silent"]);
try {
  console.log(`${sidecar.description}; ${tokenCount} tokens per stream; medians of ${values.rounds} rounds`);
  await round(edge.url, sidecar.model, 1); // warm-up
  const rows: (string | number)[][] = [];
  let single = Number.NaN;
  for (const streams of values.streams.split(",").map(Number)) {
    const rounds = [];
    for (let i = 0; i < Number(values.rounds); i++) rounds.push(await round(edge.url, sidecar.model, streams));
    const samples = rounds.flatMap((each) => each.samples);
    const perSecond = median(rounds.map((each) => each.perSecond));
    if (rows.length === 0) single = perSecond;
    const perToken = samples.map(({ firstMs, totalMs }) => (totalMs - firstMs) / (tokenCount - 1));
    rows.push([
      String(streams), String(median(samples.map(({ promptTokens }) => promptTokens))), perSecond, perSecond / single,
      median(samples.map(({ firstMs }) => firstMs)), median(perToken),
    ]);
  }
  const head = ["streams", "prompt tokens", "tokens/s", "over the first row", "TTFT, ms", "per token, ms"];
  console.log(markdownTable([head, ...rows]));
} finally {
  await edge.stop();
  await sidecar.stop();
  await pg.remove();
}
