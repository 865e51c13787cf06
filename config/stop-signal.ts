// When to stop, and when to stop at once. One wish may arrive several times: Ctrl-C in a terminal comes from the
// terminal, from npm and from start.mjs, a service manager's SIGTERM from it and from start.mjs. So a repeated signal
// counts as a second wish only after a pause.

import process from "node:process";

const SIGNALS = ["SIGINT", "SIGTERM"] as const;
const PAUSE_MS = 1000;
/** What a shell reports of a program that Ctrl-C has ended. */
const EXIT_CODE_CUT = 130;

export interface StopSignal {
  /** Aborted by the first signal. */
  readonly orderly: AbortSignal;
  /** Aborted by the second. */
  readonly atOnce: AbortSignal;
}

/**
 * hasParentPipe: the end of standard input is a signal, too: whoever started this process is gone. `others`: further
 * signals; SIGHUP is none by itself, or `nohup` would protect nobody.
 */
export function listenForStop(hasParentPipe: boolean, others: readonly "SIGHUP"[] = []): StopSignal {
  const orderly = new AbortController();
  const atOnce = new AbortController();
  let firstAt = 0;
  const begin = () => {
    if (orderly.signal.aborted) return;
    firstAt = performance.now();
    orderly.abort();
  };
  const onSignal = () => {
    if (!orderly.signal.aborted) begin();
    else if (performance.now() - firstAt > PAUSE_MS) atOnce.abort();
  };
  for (const signal of [...SIGNALS, ...others]) process.on(signal, onSignal);
  if (hasParentPipe) {
    process.stdin.once("end", begin); // a signal may follow in a moment: the same wish
    process.stdin.resume();
    process.stdin.unref?.();
  }
  return { orderly: orderly.signal, atOnce: atOnce.signal };
}

/** Resolves when told to stop, see listenForStop. Told once more, the process ends at once. */
export async function toldToStop(hasParentPipe: boolean): Promise<void> {
  const { orderly, atOnce } = listenForStop(hasParentPipe);
  atOnce.addEventListener("abort", () => process.exit(EXIT_CODE_CUT), { once: true });
  await new Promise<void>((resolve) => orderly.addEventListener("abort", () => resolve(), { once: true }));
}
