// Starting all parts, watching them, stopping them in reverse: with stand-ins for edge and sidecar, and a real
// database.

import { afterAll, afterEach, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readLauncherConfig } from "../../launcher/config.ts";
import { launch } from "../../launcher/launch.ts";
import { StartError } from "../../launcher/start-error.ts";
import { startPostgres, type TestPostgres } from "../support/postgres.ts";
import { Watch } from "../support/watch.ts";

setDefaultTimeout(60_000);

const PARTS = join(import.meta.dir, "../support/parts");
const programs = { edge: join(PARTS, "edge.ts"), sidecar: join(PARTS, "sidecar.ts") };
let pg: TestPostgres;
const cleanups: (() => unknown)[] = [];

beforeAll(async () => {
  pg = await startPostgres();
});

afterEach(async () => {
  for (const cleanup of cleanups.splice(0).toReversed()) await cleanup();
});

afterAll(async () => {
  await pg?.remove();
});

interface Changes {
  readonly flags?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  readonly build?: () => Promise<string>;
  readonly data?: string;
}

function start({ flags = [], env = {}, build = async () => "library", data = newDirectory() }: Changes = {}) {
  const journal = join(newDirectory(), "journal");
  writeFileSync(journal, "");
  const environment = { ...process.env, DATABASE_URL: pg.url, KVASIR_TEST_JOURNAL: journal, ...env };
  const config = readLauncherConfig(["--data", data, "--port", "0", ...flags], environment)!;
  const watch = new Watch();
  const said: string[] = [];
  const say = (message: string) => {
    said.push(message);
    watch.notify();
  };
  const [orderly, atOnce] = [new AbortController(), new AbortController()];
  const stop = { orderly: orderly.signal, atOnce: atOnce.signal };
  const ended = launch(config, { stop, say, programs, build });
  ended.catch(() => {}); // whoever awaits it sees it
  cleanups.push(() => {
    orderly.abort();
    atOnce.abort();
    return ended.catch(() => {}); // as above
  });
  const until = (text: string) => watch.until(() => said.some((line) => line.includes(text)));
  const lastUrl = (part: string) => {
    const lines = said.flatMap((line) => new RegExp(`^${part} listening on (\\S+)`).exec(line)?.[1] ?? []);
    return lines.at(-1)!;
  };
  return {
    data, said, until, lastUrl, ended, stop: () => orderly.abort(),
    journal: () => readFileSync(journal, "utf8").trim().split("\n").filter((line) => line !== ""),
    listened: (part: string) => said.filter((line) => line.startsWith(`${part} listening`)).length,
    untilListening: (part: string, times: number) =>
      watch.until(() => said.filter((line) => line.startsWith(`${part} listening`)).length >= times),
  };
}

function newDirectory(): string {
  const directory = mkdtempSync(join(tmpdir(), "kvasir-test-launch-"));
  cleanups.push(() => rmSync(directory, { recursive: true }));
  return directory;
}

/** Dies without an answer. */
async function kill(url: string): Promise<void> {
  await fetch(`${url}/die`).catch(() => {}); // the connection ends with the process
}

describe("a launch", () => {
  test("starts sidecar, then edge, says where everything is, and stops them in reverse", async () => {
    const run = start();
    await run.until("Kvasir is ready.");
    const banner = run.said.find((line) => line.includes("Kvasir is ready."))!;
    expect(banner).toContain(`API       ${run.lastUrl("edge")}/v1`);
    expect(banner).toContain("model     tiny");
    expect(banner).toContain(run.data);
    run.stop();
    await run.ended;
    const secret = readFileSync(join(run.data, "sidecar-secret"), "utf8").trim().length;
    expect(run.journal()).toEqual([
      `sidecar started, secret ${secret}`, `edge started, secret ${secret}`, "edge stopped", "sidecar stopped",
    ]);
    expect(run.said.at(-1)).toBe("stopped");
  });

  test("starts a part that dies again, under the address it had", async () => {
    const run = start();
    await run.until("Kvasir is ready.");
    for (const part of ["sidecar", "edge"]) {
      const url = run.lastUrl(part);
      await kill(url);
      await run.untilListening(part, 2);
      expect(run.lastUrl(part)).toBe(url);
      expect((await fetch(url)).status).toBe(200);
    }
    expect(run.said).toContain("the sidecar ended unexpectedly (exit code 3): starting it again");
    run.stop();
    await run.ended;
    expect(run.journal().slice(-2)).toEqual(["edge stopped", "sidecar stopped"]);
  });

  test("stops everything when a part keeps dying", async () => {
    const run = start();
    await run.until("Kvasir is ready.");
    for (let times = 1; times <= 4; times++) {
      await run.untilListening("sidecar", times);
      await kill(run.lastUrl("sidecar"));
    }
    await expect(run.ended).rejects.toThrow("the sidecar ended unexpectedly (exit code 3): stopping the rest");
    expect(run.journal().at(-1)).toBe("edge stopped");
  });

  test("that fails halfway stops what it has started", async () => {
    const run = start({ env: { KVASIR_TEST_FAIL: "edge" } });
    const error = await run.ended.catch((e: unknown) => e);
    expect(error).toBeInstanceOf(StartError);
    expect((error as Error).message).toBe("the edge did not start (exit code 1): see above");
    expect(run.journal().map((line) => line.split(",")[0])).toEqual([
      "sidecar started", "edge started", "sidecar stopped",
    ]);
  });

  test("that is told to stop on the way up ends in order, and is no failure", async () => {
    const { promise: isBuilding, resolve: building } = Promise.withResolvers<void>();
    const { promise: isBuilt, resolve: built } = Promise.withResolvers<string>();
    const run = start({
      build: () => {
        building();
        return isBuilt;
      },
    });
    await isBuilding;
    run.stop();
    built("library");
    await run.ended;
    expect(run.journal()).toEqual([]);
  });

  test("gives the data directory back, and refuses one that is in use", async () => {
    const first = start();
    await first.until("Kvasir is ready.");
    const second = start({ data: first.data });
    await expect(second.ended).rejects.toThrow(`is in use by another Kvasir (process ${process.pid})`);
    first.stop();
    await first.ended;
    const third = start({ data: first.data });
    await third.until("Kvasir is ready.");
  });

  test("says before anything is started that the port is taken", async () => {
    const other = createServer();
    const port = await new Promise<number>((resolve) => {
      other.listen(0, "127.0.0.1", () => resolve((other.address() as { port: number }).port));
    });
    cleanups.push(() => other.close());
    const run = start({ flags: ["--port", String(port)] });
    await expect(run.ended).rejects.toThrow(`port ${port} of 127.0.0.1 is taken`);
    expect(run.journal()).toEqual([]);
  });

  test("says in one line what is wrong with the database, or with the secret", async () => {
    const unreachable = start({ env: { DATABASE_URL: "postgres://u:hush@127.0.0.1:1/db" } });
    await expect(unreachable.ended).rejects.toThrow("cannot reach the database at postgres://u:***@127.0.0.1:1/db");
    const data = newDirectory();
    writeFileSync(join(data, "sidecar-secret"), "x".repeat(40), { mode: 0o644 });
    const open = start({ data });
    await expect(open.ended).rejects.toThrow("can be read by other users");
    expect(existsSync(join(data, "postgres"))).toBe(false);
  });
});
