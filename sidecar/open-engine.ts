// Which library serves. A GPU may turn out to be of no use only when its device opens (no driver for it, no cuBLASLt):
// where the backend was left to us, the CPU serves then.

import { EngineError } from "./engine/engine-client.ts";
import type { EngineReady } from "./engine/worker-messages.ts";
import type { Backend } from "./build-native.ts";

export interface EngineOpening<Engine> {
  readonly backend: Backend;
  /** What was asked for cannot be had from the CPU. */
  readonly needsGpu: boolean;
  /** Path of the library for a backend, see buildNative. */
  build(backend: Backend): Promise<string>;
  start(libraryPath: string): Engine;
  say(message: string): void;
}

export interface OpenedEngine<Engine> {
  readonly engine: Engine;
  readonly ready: EngineReady;
}

/** Throws BuildError or EngineError. */
export async function openEngine<Engine extends { readonly ready: Promise<EngineReady> }>(
  opening: EngineOpening<Engine>,
): Promise<OpenedEngine<Engine>> {
  const { backend, needsGpu, build, start, say } = opening;
  const open = async (libraryPath: string): Promise<OpenedEngine<Engine>> => {
    const engine = start(libraryPath);
    return { engine, ready: await engine.ready };
  };
  const libraryPath = await build(backend);
  try {
    return await open(libraryPath);
  } catch (error) {
    if (backend !== "auto" || needsGpu || !(error instanceof EngineError) || !error.isUnsupported) throw error;
    const cpuLibraryPath = await build("cpu");
    if (cpuLibraryPath === libraryPath) throw error;
    say(`${error.message}; the CPU serves`);
    return await open(cpuLibraryPath);
  }
}
