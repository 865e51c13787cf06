// The data directory: one owner, one launcher at a time, and room for a database.

import { afterEach, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { lockDataDirectory } from "../../launcher/data-directory.ts";
import { StartError } from "../../launcher/start-error.ts";

const cleanups: (() => void)[] = [];

afterEach(() => {
  for (const cleanup of cleanups.splice(0).toReversed()) cleanup();
});

function newPath(): string {
  const parent = mkdtempSync(join(tmpdir(), "kvasir-test-data-"));
  cleanups.push(() => rmSync(parent, { recursive: true }));
  return join(parent, "deep", "data");
}

describe("lockDataDirectory", () => {
  test("makes it for its owner alone, and holds it until it is released", () => {
    const path = newPath();
    const lock = lockDataDirectory(path);
    expect(statSync(path).mode & 0o077).toBe(0);
    expect(() => lockDataDirectory(path)).toThrow(`in use by another Kvasir (process ${process.pid})`);
    lock.release();
    lockDataDirectory(path).release();
  });

  test("is held by no dead process", async () => {
    const path = newPath();
    const module = join(import.meta.dir, "../../launcher/data-directory.ts");
    const script = `import { lockDataDirectory } from ${JSON.stringify(module)};
      lockDataDirectory(${JSON.stringify(path)}); process.kill(process.pid, "SIGKILL");`;
    const child = Bun.spawn([process.execPath, "-e", script], { stdout: "ignore", stderr: "inherit" });
    expect(await child.exited).not.toBe(0);
    expect(child.signalCode).toBe("SIGKILL");
    lockDataDirectory(path).release();
  });

  test("refuses a file, and a disk without room", () => {
    const path = newPath();
    lockDataDirectory(path).release();
    writeFileSync(join(path, "file"), "");
    expect(() => lockDataDirectory(join(path, "file"))).toThrow(StartError);
    expect(() => lockDataDirectory(path, 2 ** 60)).toThrow(/has \d+ MiB left, 1099511627776 MiB are needed/);
    lockDataDirectory(path).release();
  });
});
