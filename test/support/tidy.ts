// The architecture as rules over source files. Each rule takes a tree, path to text, and returns its offences as
// "path:line: what is wrong", so that a test can plant one and see it found.

import { dirname, join } from "node:path/posix";

/** Path relative to the repository -> text. */
export type SourceTree = ReadonlyMap<string, string>;

const COLUMNS_MAX = 120;
const FILE_LINES_MAX = 600;
const OPENING_LETTERS_MIN = 30;

/**
 * What each part may import besides itself. A name is a file, a folder with all below it ("db/"), or the loose
 * files of a folder ("sidecar/*"); the longest name that fits a file is its part. Nothing points upward; types
 * count, too.
 */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  "start.mjs": [],
  "config/": [],
  "db/": [],
  "edge/": ["config/", "db/", "sidecar/protocol.ts"],
  "sidecar/assert.ts": [],
  "sidecar/build-native.ts": [],
  "sidecar/config.ts": ["config/"],
  "sidecar/forgetter.ts": ["sidecar/holdings.ts", "sidecar/lineage.ts", "sidecar/protocol.ts"],
  "sidecar/holdings.ts": ["sidecar/private-database.ts"],
  "sidecar/lineage.ts": ["sidecar/private-database.ts"],
  "sidecar/private-database.ts": [],
  "sidecar/protocol.ts": [],
  "sidecar/secret.ts": [],
  "sidecar/native-symbols.ts": [],
  "sidecar/native-arguments.ts": ["sidecar/assert.ts"],
  "sidecar/native-error.ts": [],
  "sidecar/native.ts": [
    "sidecar/assert.ts",
    "sidecar/native-arguments.ts",
    "sidecar/native-error.ts",
    "sidecar/native-symbols.ts",
  ],
  "sidecar/native-disk.ts": ["sidecar/native-arguments.ts", "sidecar/native.ts"],
  "sidecar/kvcache/": ["sidecar/assert.ts", "sidecar/native.ts", "sidecar/native-disk.ts"],
  "sidecar/model/": ["sidecar/assert.ts", "sidecar/native.ts"],
  "sidecar/engine/": [
    "sidecar/assert.ts",
    "sidecar/kvcache/",
    "sidecar/model/",
    "sidecar/native.ts",
    "sidecar/protocol.ts",
  ],
  "sidecar/simulate/": ["config/", "sidecar/assert.ts", "sidecar/kvcache/"],
  // The server and what it is made of.
  "sidecar/*": [
    "sidecar/assert.ts",
    "sidecar/engine/",
    "sidecar/forgetter.ts",
    "sidecar/holdings.ts",
    "sidecar/lineage.ts",
    "sidecar/model/",
    "sidecar/protocol.ts",
  ],
  "sidecar/open-engine.ts": ["sidecar/build-native.ts", "sidecar/engine/"],
  "sidecar/main.ts": ["config/", "sidecar/"],
  "launcher/": [
    "config/",
    "db/",
    "edge/config.ts",
    "sidecar/build-native.ts",
    "sidecar/config.ts",
    "sidecar/secret.ts",
  ],
  "sidecar/native/kvasir.h": [],
  "sidecar/native/common/": ["sidecar/native/kvasir.h"],
  "sidecar/native/cpu/": ["sidecar/native/kvasir.h", "sidecar/native/common/"],
  "sidecar/native/cuda/": ["sidecar/native/kvasir.h", "sidecar/native/common/"],
  "test/": ["config/", "db/", "edge/", "launcher/", "migrations/", "sidecar/", "start.mjs"],
};

/** Modules that bind a file to one runtime or one purpose, and who may import them. */
const MODULE_USERS: readonly (readonly [module: RegExp, users: RegExp])[] = [
  [/^bun:ffi$/, /^sidecar\/native\.ts$/],
  [/^bun:test$/, /^test\//],
  [/^bun(:sqlite)?$/, /^(sidecar|launcher|test)\//],
];

/** Entry points and config files read the environment and hand it on; the hub's variables are not ours. */
const READS_ENVIRONMENT = /(^|\/)(main|config)\.ts$|^start\.mjs$|^sidecar\/model\/hub\.ts$|^test\//;

/** Loose ends, and traces of the place where a file was written. */
const FORBIDDEN_WORDS = /\b(TODO|FIXME|XXX|HACK)\b|(?<![\w.])\/(work|root|home\/\w+)\/|\bissue #?\d/;
/** They name what they forbid. */
const RULES_THEMSELVES = /^test\/(tidy\.test|support\/tidy)\.ts$/;

export const RULES: Readonly<Record<string, (tree: SourceTree) => string[]>> = {
  "parts import only what lies below them": forbiddenImports,
  "no file imports itself, however far around": importCircles,
  "only entry points and config files read the environment": strayEnvironment,
  "files open with a comment that says what they are": missingOpenings,
  "lines and files are short": tooLong,
  "no error is swallowed without a word": swallowedErrors,
  "no loose ends, no traces of a workplace": forbiddenWords,
  "files are named in kebab-case": oddNames,
};

export interface Import {
  readonly line: number;
  /** The path in the tree when it is relative, else as written. */
  readonly target: string;
  readonly isRelative: boolean;
}

const IMPORT_PATTERNS = [
  /^[ \t]*(?:import|export)\b[^"';]*?\bfrom\s*"(?<target>[^"]+)"/gm,
  /^[ \t]*import\s+"(?<target>[^"]+)"/gm,
  /\bimport\s*\(\s*"(?<target>[^"]+)"/gm,
];
const INCLUDE_PATTERNS = [/^[ \t]*#[ \t]*include[ \t]+"(?<target>[^"]+)"/gm];

export function importsOf(path: string, text: string): Import[] {
  const patterns = isNative(path) ? INCLUDE_PATTERNS : IMPORT_PATTERNS;
  return patterns.flatMap((pattern) =>
    [...text.matchAll(pattern)].map((match) => {
      const written = match.groups!["target"]!;
      const isRelative = isNative(path) || written.startsWith(".");
      return {
        line: lineAt(text, match.index + match[0].length),
        target: isRelative ? join(dirname(path), written) : written,
        isRelative,
      };
    }),
  );
}

function forbiddenImports(tree: SourceTree): string[] {
  return inEachFile(tree, (path, text) => {
    const part = partOf(path);
    if (RULES_THEMSELVES.test(path)) return [];
    if (part === null) return [[1, "belongs to no part: give its folder a place in MAY_IMPORT"]];
    return importsOf(path, text)
      .filter(({ target, isRelative }) => !(isRelative ? mayImport(part, target) : mayUse(path, target)))
      .map(({ line, target }) => [line, `${part} must not import ${target}`]);
  });
}

function mayImport(part: string, target: string): boolean {
  return partOf(target) === part || MAY_IMPORT[part]!.some((name) => covers(name, target));
}

function mayUse(path: string, module: string): boolean {
  const users = MODULE_USERS.find(([pattern]) => pattern.test(module))?.[1];
  return users === undefined || users.test(path);
}

function partOf(path: string): string | null {
  const fitting = Object.keys(MAY_IMPORT).filter((name) => covers(name, path));
  return fitting.toSorted((a, b) => b.length - a.length)[0] ?? null;
}

function covers(name: string, path: string): boolean {
  if (name.endsWith("/*")) return dirname(path) === name.slice(0, -2);
  return name.endsWith("/") ? path.startsWith(name) : path === name;
}

/** Depth first; each circle is told once, from where it was entered. */
function importCircles(tree: SourceTree): string[] {
  const circles: string[] = [];
  const finished = new Set<string>();
  const way: string[] = [];
  const visit = (path: string): void => {
    if (finished.has(path)) return;
    const start = way.indexOf(path);
    if (start >= 0) {
      circles.push([...way.slice(start), path].join(" -> "));
      return;
    }
    way.push(path);
    for (const { target, isRelative } of importsOf(path, tree.get(path)!)) {
      if (isRelative && tree.has(target)) visit(target);
    }
    way.pop();
    finished.add(path);
  };
  for (const path of tree.keys()) visit(path);
  return circles;
}

function strayEnvironment(tree: SourceTree): string[] {
  const pattern = /\b(?:process|Bun)\.env\b|\bDeno\.env\b|\bimport\.meta\.env\b/;
  return inEachLine(tree, (path, line) => {
    const isStray = !READS_ENVIRONMENT.test(path) && pattern.test(line);
    return isStray ? "reads the environment: take it as an argument" : null;
  });
}

function missingOpenings(tree: SourceTree): string[] {
  return inEachFile(tree, (path, text) => {
    const body = text.replace(/^#!.*\n/, "");
    const opening = /^(?:\/\/[^\n]*\n)+|^\/\*[^]*?\*\//.exec(body)?.[0] ?? "";
    const letters = opening.replaceAll(/[^\p{L}]/gu, "").length;
    return letters >= OPENING_LETTERS_MIN ? [] : [[1, `${path} does not say what it is and why`]];
  });
}

function tooLong(tree: SourceTree): string[] {
  const files = inEachFile(tree, (_, text) => {
    const lines = text.split("\n").length - 1;
    return lines > FILE_LINES_MAX ? [[lines, `more than ${FILE_LINES_MAX} lines`]] : [];
  });
  const lines = inEachLine(tree, (_, line) => {
    if (line.length <= COLUMNS_MAX || isTableRow(line)) return null;
    return `${line.length} columns, ${COLUMNS_MAX} are the most`;
  });
  return [...files, ...lines];
}

/** A row of an option table: one line each, so that flags and defaults stand in columns. */
function isTableRow(line: string): boolean {
  return /^\s*\{ flag: ".*\},$/.test(line);
}

const SWALLOWED = [
  /\bcatch\s*(?:\([^)]*\))?\s*\{\s*\}/g,
  /\.catch\(\s*\(\)\s*=>\s*\{\s*\}\s*\)(?!.*\/\/)/g,
];

function swallowedErrors(tree: SourceTree): string[] {
  return inEachFile(tree, (path, text) => {
    if (RULES_THEMSELVES.test(path)) return [];
    const matches = SWALLOWED.flatMap((pattern) => Array.from(text.matchAll(pattern)));
    const message = "swallows an error: handle it, or say why it does not matter";
    return matches.map(({ index }) => [lineAt(text, index), message]);
  });
}

function forbiddenWords(tree: SourceTree): string[] {
  return inEachLine(tree, (path, line) => {
    const word = RULES_THEMSELVES.test(path) ? undefined : FORBIDDEN_WORDS.exec(line)?.[0];
    return word === undefined ? null : `says "${word}"`;
  });
}

function oddNames(tree: SourceTree): string[] {
  return [...tree.keys()].filter((path) => !/(^|\/)[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+)+$/.test(path));
}

type Offence = readonly [line: number, message: string];

function inEachFile(
  tree: SourceTree,
  rule: (path: string, text: string) => readonly Offence[],
): string[] {
  return [...tree].flatMap(([path, text]) =>
    rule(path, text).map(([line, message]) => `${path}:${line}: ${message}`),
  );
}

function inEachLine(tree: SourceTree, rule: (path: string, line: string) => string | null): string[] {
  return inEachFile(tree, (path, text) =>
    text.split("\n").flatMap((line, i) => {
      const message = rule(path, line);
      return message === null ? [] : [[i + 1, message] as const];
    }),
  );
}

function isNative(path: string): boolean {
  return /\.(c|cpp|cu|cuh|h)$/.test(path);
}

function lineAt(text: string, index: number): number {
  return text.slice(0, index).split("\n").length;
}
