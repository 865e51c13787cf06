// start.mjs, the first thing that runs on a fresh clone: machines it refuses, and when it installs.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { findBun, isInstalled, unsupported } from "../start.mjs";

const machine = { platform: "linux", arch: "x64", nodeMajor: 22, glibc: "2.36" };
let root: string;

beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), "kvasir-test-start-"));
  write("package.json", JSON.stringify({ dependencies: { a: "1.0.0" }, devDependencies: { b: "2.0.0" } }));
  write("package-lock.json", "{}");
});

afterEach(() => rmSync(root, { recursive: true }));

function write(path: string, content: string | Uint8Array): void {
  mkdirSync(dirname(join(root, path)), { recursive: true });
  writeFileSync(join(root, path), content);
}

const BUN = new Uint8Array(1_000_001);
const REAL_BUN = "node_modules/@oven/bun-linux-x64-baseline/bin/bun";
const stamp = (lock: string) =>
  `${process.platform}-${process.arch} ${createHash("sha256").update(lock).digest("hex")}\n`;

describe("unsupported", () => {
  test("lets the machines in that can run it", () => {
    expect(unsupported(machine)).toBeNull();
    expect(unsupported({ ...machine, platform: "darwin", arch: "arm64", glibc: null })).toBeNull();
  });

  test("says why not, and what would do", () => {
    const cases: [Partial<typeof machine> | { glibc: null }, string][] = [
      [{ nodeMajor: 18 }, "Node 18 is too old: install Node 20 or newer"],
      [{ platform: "win32" }, "win32-x64 is not supported"],
      [{ arch: "riscv64" }, "linux-riscv64 is not supported"],
      [{ glibc: null }, "has no glibc (musl?)"],
      [{ glibc: "2.17" }, "glibc 2.17 is too old: 2.27 or newer is needed"],
    ];
    for (const [changes, message] of cases) expect(unsupported({ ...machine, ...changes })).toContain(message);
  });
});

describe("findBun", () => {
  test("takes the real one, wherever install scripts have left it", () => {
    expect(findBun(root)).toBeNull();
    write("node_modules/bun/bin/bun.exe", "#!/bin/sh\necho a stub\n");
    expect(findBun(root)).toBeNull();
    write(REAL_BUN, BUN);
    expect(findBun(root)).toBe(join(root, REAL_BUN));
    write("node_modules/bun/bin/bun.exe", BUN);
    expect(findBun(root)).toBe(join(root, "node_modules/bun/bin/bun.exe"));
  });
});

describe("isInstalled", () => {
  test("trusts its stamp, while the lock file is the same", () => {
    expect(isInstalled(root)).toBe(false);
    write(REAL_BUN, BUN);
    write("node_modules/.kvasir-installed", stamp("{}"));
    expect(isInstalled(root)).toBe(true);
    write("package-lock.json", '{"changed": true}');
    expect(isInstalled(root)).toBe(false);
  });

  test("of what was installed by hand looks at the pinned versions", () => {
    write(REAL_BUN, BUN);
    write("node_modules/a/package.json", '{"version": "1.0.0"}');
    expect(isInstalled(root)).toBe(false);
    write("node_modules/b/package.json", '{"version": "2.0.0"}');
    expect(isInstalled(root)).toBe(true);
    write("node_modules/b/package.json", '{"version": "2.1.0"}');
    expect(isInstalled(root)).toBe(false);
  });
});
