// Greedy recall of the bundled model over its whole evaluation set, by distance: the table of its card, from
// our kernels. Run: bun test/bench/recall.ts [--every N]

import { BUNDLED_MODEL, readRecall, RecallRunner } from "../support/recall.ts";
import { TestModel } from "../support/test-model.ts";
import { benchOptions } from "./bench-options.ts";

/** The card's row: whole answer equal to the expected sentence. */
const CARD: Readonly<Record<number, number>> = {
  100: 100, 300: 98.8, 600: 100, 1000: 100, 1500: 97.6, 1900: 96.4,
};

const values = benchOptions(import.meta.path, { every: { type: "string", default: "1" } });
const items = readRecall().filter((_, index) => index % Number(values.every) === 0);
using model = await TestModel.load(BUNDLED_MODEL, { blockTokens: 64 });
const runner = await RecallRunner.create(model);
const buckets = new Map<number, { right: number; count: number }>();
const startedAtMs = performance.now();
for (const item of items) {
  const bucket = buckets.get(item.bucket) ?? { right: 0, count: 0 };
  buckets.set(item.bucket, bucket);
  const answer = runner.answer(item);
  bucket.count++;
  if (answer === item.expected) bucket.right++;
  else console.log(`  ${item.id}: ${JSON.stringify(answer)}, not ${JSON.stringify(item.expected)}`);
}
console.log(JSON.stringify(model.model.device.info()));
console.log(`${items.length} items in ${((performance.now() - startedAtMs) / 1000).toFixed(1)} s`);
console.log("| tokens between telling and answer | exact | the card says |\n| --- | --- | --- |");
for (const [bucket, { right, count }] of buckets) {
  const exact = `${((100 * right) / count).toFixed(1)} % of ${count}`;
  console.log(`| about ${bucket} | ${exact} | ${CARD[bucket]} % |`);
}
