// The log: one JSON line per event, on standard error, so that standard output stays for the launcher.

import { pino } from "pino";

/** Fields first, then a sentence, as pino has it. */
export type Log = Pick<pino.Logger, "debug" | "info" | "warn" | "error">;

export function openLog(level: string): Log {
  return pino({ level, base: { part: "edge" } }, pino.destination({ dest: 2, sync: true }));
}
