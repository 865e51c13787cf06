// A stand-in for an edge or a sidecar, for tests of what starts and stops them: it listens, says so, notes its start
// and its end in the file KVASIR_TEST_JOURNAL, and dies when asked.

import { appendFileSync } from "node:fs";
import process from "node:process";
import { parseArgs } from "node:util";

export function runPart(name: string): void {
  const note = (what: string) => appendFileSync(process.env["KVASIR_TEST_JOURNAL"]!, `${name} ${what}\n`);
  note(`started, secret ${process.env["KVASIR_SIDECAR_SECRET"]?.length ?? 0}`);
  if (process.env["KVASIR_TEST_FAIL"] === name) {
    console.error(`${name}: cannot start, says the test`);
    process.exit(1);
  }
  const { values } = parseArgs({ options: { port: { type: "string", default: "0" } }, strict: false });
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: Number(values.port),
    fetch: ({ url }) => {
      if (url.endsWith("/die")) process.exit(3);
      return Response.json({ sidecars: [{ model: "tiny" }], pid: process.pid });
    },
  });
  console.log(`${name} listening on http://127.0.0.1:${server.port}`);
  const stop = () => {
    note("stopped");
    process.exit(0);
  };
  process.once("SIGTERM", stop);
  process.stdin.once("end", stop);
  process.stdin.resume();
}
