// Time to first token over the turns of one growing conversation, with its cache and without: the sidecar's own
// measurement, from the receipt of the request. Without a cache means the same messages under an account of its own.
//
//   bun test/bench/turns.ts [--turns 8] [--words 180] [--rounds 5] [-- sidecar flags, such as --model DIR]

import { type BenchMessage, BenchSidecar, newSalt } from "../support/bench-sidecar.ts";
import { SeededRandom } from "../support/seeded-random.ts";
import { markdownTable, median } from "../support/table.ts";
import { benchOptions } from "./bench-options.ts";

const split = process.argv.indexOf("--");
const values = benchOptions(import.meta.path, {
  turns: { type: "string", default: "8" },
  words: { type: "string", default: "180" },
  rounds: { type: "string", default: "5" },
});
const turnCount = Number(values.turns);
const ANSWER_TOKENS = 24;
const WORDS = "the sea was calm and ships came from far away with salt wood cloth and many old stories".split(" ");

/** What a user says in one turn. */
function speech(random: SeededRandom): string {
  return Array.from({ length: Number(values.words) }, () => WORDS[random.integer(0, WORDS.length - 1)]).join(" ");
}

type Turn = { promptTokens: number; cachedTokens: number; cachedMs: number; plainMs: number };

async function converse(sidecar: BenchSidecar, seed: number): Promise<Turn[]> {
  const random = new SeededRandom(seed);
  const salt = newSalt();
  const messages: BenchMessage[] = [];
  const turns: Turn[] = [];
  for (let turn = 0; turn < turnCount; turn++) {
    messages.push({ role: "user", content: speech(random) });
    const fields = { max_tokens: ANSWER_TOKENS, truncation: "disabled" };
    const plain = await sidecar.ask(messages, newSalt(), fields);
    const cached = await sidecar.ask(messages, salt, fields);
    if (plain.text !== cached.text) throw new Error(`turn ${turn + 1} says something else with its cache`);
    const { usage, timings } = cached.done;
    const { gpu, host, disk } = usage.cachedTokens;
    turns.push({
      promptTokens: usage.promptTokens, cachedTokens: gpu + host + disk, cachedMs: timings.ttftMs,
      plainMs: plain.done.timings.ttftMs,
    });
    messages.push({ role: "assistant", content: cached.text });
  }
  return turns;
}

const sidecar = await BenchSidecar.start(split < 0 ? [] : process.argv.slice(split + 1));
try {
  console.log(`${sidecar.description}; median of ${values.rounds} conversations`);
  await converse(sidecar, 0); // warm-up
  const rounds: Turn[][] = [];
  for (let round = 1; round <= Number(values.rounds); round++) rounds.push(await converse(sidecar, round));
  const rows = Array.from({ length: turnCount }, (_, turn) => {
    const of = (field: keyof Turn) => median(rounds.map((turns) => turns[turn]![field]));
    const [cachedMs, plainMs] = [of("cachedMs"), of("plainMs")];
    return [
      String(turn + 1), String(of("promptTokens")), String(of("cachedTokens")), plainMs, cachedMs, plainMs / cachedMs,
    ];
  });
  const head = ["turn", "prompt tokens", "of them cached", "TTFT without cache, ms", "with, ms", "ratio"];
  console.log(markdownTable([head, ...rows]));
} finally {
  await sidecar.stop();
}
