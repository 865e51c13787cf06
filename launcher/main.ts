// `npm start`: runs all of Kvasir on this machine until it is told to stop.

import process from "node:process";
import { OptionError } from "../config/options.ts";
import { listenForStop } from "../config/stop-signal.ts";
import { DatabaseUnavailable } from "../db/client.ts";
import { PostgresError } from "../db/embedded-postgres.ts";
import { DatabaseRefused, SchemaTooNew } from "../db/migrate.ts";
import { BuildError } from "../sidecar/build-native.ts";
import { launcherHelp, readLauncherConfig } from "./config.ts";
import { launch } from "./launch.ts";
import { StartError } from "./start-error.ts";

/** Whose message is for the person who typed the command, without a stack. */
const EXPECTED = [
  StartError, OptionError, BuildError, PostgresError, DatabaseUnavailable, DatabaseRefused, SchemaTooNew,
];

async function main(): Promise<void> {
  const config = readLauncherConfig(process.argv.slice(2), process.env);
  if (config === null) {
    console.log(launcherHelp());
    return;
  }
  const stop = listenForStop(process.env["KVASIR_PARENT_PIPE"] === "1", ["SIGHUP"]);
  await launch(config, { stop, say: (message) => console.log(message) });
}

try {
  await main();
  process.exit(0);
} catch (error) {
  const isExpected = EXPECTED.some((kind) => error instanceof kind);
  console.error("kvasir:", isExpected ? (error as Error).message : error);
  process.exit(1);
}
