// When to stop, and when to stop at once. Ctrl-C in a terminal reaches this process twice, from the terminal and
// from npm, so a repeated signal counts as a second wish only after a pause.

import process from "node:process";

const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
const PAUSE_MS = 500;

export interface StopSignal {
  /** Aborted by the first signal. */
  readonly orderly: AbortSignal;
  /** Aborted by the second. */
  readonly atOnce: AbortSignal;
}

/** hasParentPipe: the end of standard input is a signal, too: whoever started this process is gone. */
export function listenForStop(hasParentPipe: boolean): StopSignal {
  const orderly = new AbortController();
  const atOnce = new AbortController();
  let firstAt = 0;
  const onSignal = () => {
    if (!orderly.signal.aborted) {
      firstAt = performance.now();
      orderly.abort();
    } else if (performance.now() - firstAt > PAUSE_MS) {
      atOnce.abort();
    }
  };
  for (const signal of SIGNALS) process.on(signal, onSignal);
  if (hasParentPipe) {
    process.stdin.once("end", () => orderly.abort());
    process.stdin.resume();
    process.stdin.unref?.();
  }
  return { orderly: orderly.signal, atOnce: atOnce.signal };
}
