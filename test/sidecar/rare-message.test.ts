// Once in a while, however often it is reported, and nothing is lost without being counted.

import { expect, test } from "bun:test";
import { RareMessage } from "../../sidecar/rare-message.ts";

test("is said once in each pause, with the number of those held back", () => {
  const said: string[] = [];
  const rare = new RareMessage((message) => said.push(message), 1000);
  for (const nowMs of [0, 1, 999]) rare.report("refused", nowMs);
  expect(said).toEqual(["refused"]);
  rare.report("refused again", 1000);
  rare.report("refused", 1500);
  rare.report("refused", 2500);
  rare.report("refused", 3500);
  expect(said.slice(1)).toEqual(["refused again; 2 more like it before", "refused; 1 more like it before", "refused"]);
});
