// `bun run sidecar`: reads the configuration, loads the model in the engine worker, serves edges until told to stop.

import { mkdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { OptionError } from "../config/options.ts";
import { checkPortFree } from "../config/port.ts";
import { toldToStop } from "../config/stop-signal.ts";
import { buildNative } from "./build-native.ts";
import { readSidecarConfig, type SidecarConfig, sidecarHelp } from "./config.ts";
import { EngineClient } from "./engine/engine-client.ts";
import type { EngineReady } from "./engine/worker-messages.ts";
import { Holdings } from "./holdings.ts";
import { Lineage } from "./lineage.ts";
import { type ChatTemplate, loadChatTemplate } from "./model/chat-template.ts";
import { resolveModel } from "./model/hub.ts";
import { loadTokenizer, type Tokenizer } from "./model/tokenizer.ts";
import { openEngine } from "./open-engine.ts";
import { PromptBuilder } from "./prompt.ts";
import { loadSecret } from "./secret.ts";
import { SidecarServer } from "./server.ts";

/** Segments of text whose ids are remembered; some hundred bytes each. */
const LINEAGE_SEGMENTS_MAX = 500_000;
/** Context windows of the longest text whose ids are remembered. */
const LINEAGE_SEGMENT_WINDOWS_MAX = 16;
/** Blocks and segments that conversations hold; some 60 bytes each. */
const HOLDINGS_ITEMS_MAX = 2_000_000;
const SLOW_EDGE_TIMEOUT_MS = 30_000;
/** A stop waits so long for the disk tier to take what is still in memory. */
const FLUSH_TIMEOUT_MS = 10_000;

async function main(): Promise<void> {
  const config = readSidecarConfig(process.argv.slice(2), process.env);
  if (config === null) {
    console.log(sidecarHelp());
    return;
  }
  await checkPortFree(config.host, config.port);
  mkdirSync(config.dataDirectory, { recursive: true, mode: 0o700 });
  const secret = config.secret ?? loadSecret(join(config.dataDirectory, "sidecar-secret"));
  const directory = await resolveModel(config.model, { onProgress: say });
  const [tokenizer, template] = await Promise.all([
    loadTokenizer(directory),
    loadChatTemplate(directory),
  ]);
  let server: SidecarServer | null = null;
  const { engine, ready } = await openEngine({
    backend: config.backend,
    needsGpu: config.quantization !== "none",
    build: (backend) => buildNative(backend, { onProgress: say }),
    start: (library) => startEngine(config, directory, library, (events) => server?.applyEvents(events)),
    say,
  });
  describeEngine(ready, config);
  const texts = { modelDirectory: directory, tokenizer, template };
  const { server: started, close } = await orStop(engine, () => startServer(config, secret, { texts, engine, ready }));
  server = started;
  say(`sidecar listening on ${server.url}`);
  await toldToStop(process.env["KVASIR_PARENT_PIPE"] === "1");
  say("stopping: waiting for answers in progress");
  await server.drain(config.drainTimeoutMs);
  await engine.stop(FLUSH_TIMEOUT_MS);
  close();
  tokenizer.close();
  say("sidecar stopped");
}

/** Stops the engine when the work fails: its host tier would stay in shared memory. */
async function orStop<Result>(engine: EngineClient, work: () => Result): Promise<Result> {
  try {
    return work();
  } catch (error) {
    await engine.stop(FLUSH_TIMEOUT_MS);
    throw error;
  }
}

interface ServerParts {
  readonly texts: {
    readonly modelDirectory: string;
    readonly tokenizer: Tokenizer;
    readonly template: ChatTemplate;
  };
  readonly engine: EngineClient;
  readonly ready: EngineReady;
}

/** The server, and what closes its files after it and the engine have stopped. */
function startServer(
  config: SidecarConfig,
  secret: string,
  { texts: { modelDirectory, tokenizer, template }, engine, ready }: ServerParts,
): { server: SidecarServer; close: () => void } {
  const tokenizerJson = readFileSync(join(modelDirectory, "tokenizer.json"));
  const lineage = new Lineage({
    path: join(config.dataDirectory, "lineage.sqlite"),
    tokenizerId: new Bun.CryptoHasher("sha256").update(tokenizerJson).digest("hex"),
    specialTokens: tokenizer.specialTokens,
    maxSegments: LINEAGE_SEGMENTS_MAX,
    maxSegmentTokens: LINEAGE_SEGMENT_WINDOWS_MAX * ready.maxModelLen,
  });
  const holdings = new Holdings({
    path: join(config.dataDirectory, "holdings.sqlite"),
    maxItems: HOLDINGS_ITEMS_MAX,
  });
  const modelId = config.modelId ?? basename(config.model);
  const { maxModelLen, vocabSize } = ready;
  const prompts = new PromptBuilder(template, tokenizer, lineage, { modelId, maxModelLen, vocabSize });
  const server = new SidecarServer(
    { engine, prompts, tokenizer, lineage, holdings },
    {
      name: config.name,
      host: config.host,
      port: config.port,
      secret,
      model: {
        id: modelId,
        maxModelLen,
        vocabSize,
        blockTokens: config.blockTokens,
        backend: String(ready.device["backend"]),
        created: Math.floor(Date.now() / 1000),
      },
      maxRequests: config.maxNumSeqs + config.maxWaiting,
      cacheTtlMs: config.cache.ttlMs,
      slowEdgeTimeoutMs: SLOW_EDGE_TIMEOUT_MS,
      say,
    },
  );
  const close = () => {
    lineage.close();
    holdings.close();
  };
  return { server, close };
}

function startEngine(
  config: SidecarConfig,
  modelDirectory: string,
  libraryPath: string,
  onEvents: SidecarServer["applyEvents"],
): EngineClient {
  return new EngineClient(
    {
      libraryPath,
      modelDirectory,
      randomWeights: config.randomWeights,
      maxModelLen: config.maxModelLen,
      maxNumSeqs: config.maxNumSeqs,
      maxBatchTokens: config.maxBatchTokens,
      maxWaiting: config.maxWaiting,
      blockTokens: config.blockTokens,
      gpuBlocks: config.gpuBlocks,
      gpuMemoryBytes: config.gpuMemoryBytes,
      gpuMemoryUtilization: config.gpuMemoryUtilization,
      kvDtype: config.kvDtype,
      computeDtype: config.computeDtype,
      quantization: config.quantization,
      threads: config.threads,
      gpuIndex: config.gpuIndex,
      cache: { ...config.cache, hostName: sharedMemoryName(config) },
    },
    { onEvents, onProgress: say, onFailure: fail },
  );
}

function describeEngine(ready: EngineReady, config: SidecarConfig): void {
  say(`device: ${JSON.stringify(ready.device)}`);
  const loadMs = Math.round(ready.loadMs);
  say(`model: ${ready.maxModelLen} tokens of context, KV cache ${ready.kvDtype}, loaded in ${loadMs} ms`);
  say(`requests: at most ${config.maxNumSeqs} sequences at once, ${config.maxWaiting} waiting`);
}

/** The host tier's name: another one for each data directory of each user. */
function sharedMemoryName({ dataDirectory, cache }: SidecarConfig): string {
  const owner = `${process.getuid?.() ?? 0}\0${dataDirectory}\0${cache.diskPath}`;
  return `/kvasir-${new Bun.CryptoHasher("sha256").update(owner).digest("hex").slice(0, 24)}`;
}

function say(message: string): void {
  console.log(message);
}

function fail(message: string): never {
  console.error(`sidecar: ${message}`);
  process.exit(1);
}

try {
  await main();
  process.exit(0);
} catch (error) {
  fail(error instanceof OptionError ? error.message : (error as Error).message);
}
