// A process with an engine of its own that holds a conversation and kills itself, as kill -9 does, at a given turn of
// its loop. Argument: a Life as JSON.
import { type ModelEngineOptions, ModelEngine } from "./model-engine.ts";

export interface Life {
  readonly engine: ModelEngineOptions;
  /** New tokens of each turn of the conversation. */
  readonly news: readonly (readonly number[])[];
  readonly maxTokens: number;
  /** Turn of the engine's loop at which it dies; null: once all is answered and nothing moves any more. */
  readonly killAtTurn: number | null;
}

/** Resolves when it has died of SIGKILL; throws what it wrote when it died of anything else. */
export async function liveAndDie(life: Life): Promise<void> {
  const path = import.meta.path;
  const child = Bun.spawn([process.execPath, path, JSON.stringify(life)], { stdout: "ignore", stderr: "pipe" });
  const message = await new Response(child.stderr).text();
  await child.exited;
  if (child.signalCode !== "SIGKILL") throw new Error(`ended with ${child.exitCode}: ${message}`);
}

async function live({ engine: options, news, maxTokens, killAtTurn }: Life): Promise<void> {
  const engine = await ModelEngine.open(options);
  const die = () => process.kill(process.pid, "SIGKILL");
  let turn = 0;
  engine.onTurn = () => {
    if (turn++ === killAtTurn) die();
  };
  engine.converse(news, maxTokens);
  engine.quiet();
  die();
}

if (import.meta.main) await live(JSON.parse(process.argv[2]!) as Life);
