// llama.cpp beside our own library in bench/cpu.ts, from a folder where this was run:
//   npm install --ignore-scripts --omit=optional node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { loadModelConfig } from "../../sidecar/model/architecture.ts";
import type { GatedConfig } from "../../sidecar/model/model-config.ts";
import { SafetensorsFile } from "../../sidecar/model/safetensors.ts";
import { writeGguf } from "./gguf.ts";

/** "prefill:512" or "decode:64" -> milliseconds of each repeat. */
export type LlamaCppTimes = Readonly<Record<string, readonly number[]>>;

export class LlamaCpp {
  readonly #directory = mkdtempSync(join(tmpdir(), "kvasir-llamacpp-"));
  readonly #libraries: string;
  readonly #program = join(this.#directory, "llamacpp");
  readonly #model = join(this.#directory, "model.gguf");

  /** installation: the folder of npm install. Its headers come from the release that the package carries. */
  constructor(installation: string) {
    const modules = join(resolve(installation), "node_modules");
    this.#libraries = join(modules, "@node-llama-cpp/linux-x64/bins/linux-x64");
    const release = join(this.#directory, "release");
    run(["git", "clone", "-q", "--no-checkout", join(modules, "node-llama-cpp/llama/gitRelease.bundle"), release]);
    run(["git", "-C", release, "checkout", "-q", "HEAD", "--", "include", "ggml/include"]);
    const libraries = readdirSync(this.#libraries)
      .filter((name) => /^lib(llama|ggml|ggml-base)\.(v[\d.]+\.)?so$/.test(name))
      .map((name) => join(this.#libraries, name));
    const includes = ["include", "ggml/include"].map((folder) => `-I${join(release, folder)}`);
    run([
      "g++", "-std=c++20", "-O2", ...includes, join(import.meta.dir, "llamacpp.cpp"), ...libraries,
      `-Wl,-rpath,${this.#libraries}`, "-Wl,--allow-shlib-undefined", "-o", this.#program,
    ]);
  }

  /** The model that measure() runs: a directory's, or a random one of its config.json. */
  prepare(directory: string, randomWeights: boolean): void {
    const config = loadModelConfig(directory) as GatedConfig;
    const weights = randomWeights ? null : new SafetensorsFile(join(directory, "model.safetensors"));
    writeGguf(this.#model, config, weights);
    weights?.close();
  }

  measure(work: readonly string[], threads: number, repeats: number, steps: number): LlamaCppTimes {
    const counts = [threads, repeats, steps].map(String);
    return JSON.parse(run([this.#program, this.#model, this.#libraries, ...counts, ...work])) as LlamaCppTimes;
  }

  [Symbol.dispose](): void {
    rmSync(this.#directory, { recursive: true });
  }
}

function run(command: readonly string[]): string {
  const { success, stdout, stderr, exitCode } = Bun.spawnSync([...command]);
  if (!success) throw new Error(`${command[0]} ended with ${exitCode}: ${stderr.toString()}`);
  return stdout.toString();
}
