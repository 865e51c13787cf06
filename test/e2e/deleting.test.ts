// A conversation whose turn was broken off by the end of its sidecar, and that is deleted after the next start: nothing
// of it is found again, in host memory or on disk.

import { afterAll, afterEach, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { CompletionStream } from "../../edge/completion-stream.ts";
import "../support/cpu-library.ts"; // built before the first test's time runs
import { MODEL } from "../support/sidecar-process.ts";
import { submitRequest } from "../support/submit-request.ts";
import { Talker } from "../support/talker.ts";

setDefaultTimeout(120_000);

const CONVERSATION = "c1";
const SALT = new Uint8Array(32).fill(3);
/** Several blocks. */
const TEXT = Array.from({ length: 120 }, (_, i) => `word${i} and`).join(" ");

const folder = mkdtempSync(join(tmpdir(), "kvasir-deleting-"));
afterEach(Talker.killAll);
afterAll(() => rmSync(folder, { recursive: true }));

function submit({ client }: Talker, maxTokens: number): CompletionStream {
  return client.submit(
    submitRequest({
      model: MODEL, salt: SALT, conversation: CONVERSATION, messages: [{ role: "user", content: TEXT }],
      sampling: { maxTokens, ignoreEos: true },
    }),
  );
}

/** A turn that goes on for long, after its first answers. */
async function beginTurn(talker: Talker, events: number): Promise<CompletionStream> {
  const stream = submit(talker, 2000);
  for (let i = 0; i < events; i++) await stream.next();
  return stream;
}

async function cachedTokens(talker: Talker): Promise<number> {
  const stream = submit(talker, 1);
  for (;;) {
    const event = await stream.next();
    if (event.type !== "done") continue;
    const { gpu, host, disk } = event.done.usage.cachedTokens;
    return gpu + host + disk;
  }
}

const ENDS: Record<string, { flags: string[]; end: (talker: Talker) => Promise<void> }> = {
  "was left by its client just before an orderly stop": {
    flags: [],
    end: async (talker) => {
      (await beginTurn(talker, 8)).abort();
      await talker.stop();
    },
  },
  "was still being answered when an orderly stop could wait no longer": {
    flags: ["--drain-timeout", "1"],
    end: async (talker) => {
      await beginTurn(talker, 8);
      expect(await talker.process.stop()).toBe(0);
    },
  },
  "was being answered when the process was killed": {
    flags: ["--tiers", "inclusive"], // what is computed is in host memory at once
    end: async (talker) => {
      await beginTurn(talker, 60);
      await talker.kill();
    },
  },
};

test.each(Object.entries(ENDS))("a turn that %s is deleted for good", async (_, { flags, end }) => {
  const data = mkdtempSync(join(folder, "data-"));
  await end(await Talker.start({ data, flags }));
  const next = await Talker.start({ data, flags });
  const removed = await next.client.forget(SALT, CONVERSATION);
  expect(Object.values(removed).reduce((sum, count) => sum + count, 0)).toBeGreaterThan(0);
  expect(await cachedTokens(next)).toBe(0);
  await next.stop();
});
