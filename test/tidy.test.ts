// The architecture and the style as a test: the repository keeps every rule, and every rule finds its offence
// when one is planted.

import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { RULES, type SourceTree } from "./support/tidy.ts";

const ROOT = join(import.meta.dir, "..");
const SOURCES = new Bun.Glob("{config,db,edge,launcher,sidecar,test}/**/*.{ts,mjs,c,cpp,cu,cuh,h}");

function readSources(): SourceTree {
  const paths = ["start.mjs", ...SOURCES.scanSync(ROOT)].sort();
  return new Map(paths.map((path) => [path, readFileSync(join(ROOT, path), "utf8")]));
}

const OPENING = "// A file of a made-up tree, for the rules to look at.\n";

/** Two files per offence: one path with its text, the others empty but for their opening. */
const PLANTED: Readonly<Record<keyof typeof RULES, readonly [path: string, text: string][]>> = {
  "parts import only what lies below them": [
    ["edge/app.ts", 'import { x } from "../sidecar/engine/engine.ts";\n'],
    ["edge/app.ts", 'import type {\n  X,\n} from "../sidecar/native.ts";\n'],
    ["sidecar/protocol.ts", 'export { x } from "../edge/app.ts";\n'],
    ["sidecar/kvcache/kv-cache.ts", 'import { x } from "../model/model.ts";\n'],
    ["sidecar/model/model.ts", 'import "../kvcache/kv-cache.ts";\n'],
    ["sidecar/engine/engine.ts", 'const x = await import("../server.ts");\n'],
    ["sidecar/server.ts", 'import { x } from "./native.ts";\n'],
    ["sidecar/engine/engine.ts", 'import { dlopen } from "bun:ffi";\n'],
    ["db/client.ts", 'import { Database } from "bun:sqlite";\n'],
    ["edge/app.ts", 'import { test } from "bun:test";\n'],
    ["db/client.ts", 'import { x } from "../test/support/postgres.ts";\n'],
    ["sidecar/native/common/disk.cpp", '#include "../cpu/device.h"\n'],
    ["tools/script.ts", ""],
  ],
  "no file imports itself, however far around": [
    ["edge/app.ts", 'import { x } from "./app.ts";\n'],
    ["edge/app.ts", 'import type { X } from "./around.ts";\n'],
  ],
  "only entry points and config files read the environment": [
    ["edge/app.ts", "const port = process.env.PORT;\n"],
    ["sidecar/server.ts", 'const key = Bun.env["KEY"];\n'],
  ],
  "files open with a comment that says what they are": [
    ["edge/app.ts", ""],
    ["edge/app.ts", "// App\n"],
    ["sidecar/native/cpu/device.h", "#pragma once\n"],
  ],
  "lines and files are short": [
    ["edge/app.ts", `${OPENING}// ${"x".repeat(118)}\n`],
    ["sidecar/native/cpu/device.h", `${OPENING}// ${"x".repeat(118)}\n`],
    ["edge/app.ts", OPENING + "\n".repeat(600)],
  ],
  "no error is swallowed without a word": [
    ["edge/app.ts", "try {\n  run();\n} catch {\n}\n"],
    ["edge/app.ts", "try { run(); } catch (error) {}\n"],
    ["edge/app.ts", "void run().catch(() => {});\n"],
  ],
  "no loose ends, no traces of a workplace": [
    ["edge/app.ts", "// TODO: later\n"],
    ["edge/app.ts", "const path = '/root/kvasir/data';\n"],
    ["edge/app.ts", "// see issue #12\n"],
  ],
  "files are named in kebab-case": [
    ["edge/chatCompletions.ts", OPENING],
    ["edge/chat_completions.ts", OPENING],
  ],
};

/** What surrounds a planted file: clean by every rule. */
const SURROUNDINGS: SourceTree = new Map([
  ["edge/around.ts", `${OPENING}import { x } from "./app.ts";\nvoid x().catch(() => {}); // it may be gone\n`],
  ["sidecar/protocol.ts", OPENING],
]);

describe.each(Object.entries(RULES))("%s", (name, rule) => {
  test("here", () => {
    expect(rule(readSources())).toEqual([]);
  });

  test.each([...PLANTED[name]!.entries()])("not in planted tree %i", (_, [path, text]) => {
    const tree = new Map([...SURROUNDINGS, [path, text]]);
    expect(rule(tree)).toHaveLength(1);
    expect(rule(SURROUNDINGS)).toEqual([]);
  });
});
