// A GPU that turns out to be of no use, asked for or not.

import { expect, test } from "bun:test";
import type { Backend } from "../../sidecar/build-native.ts";
import { EngineError } from "../../sidecar/engine/engine-client.ts";
import type { EngineReady } from "../../sidecar/engine/worker-messages.ts";
import { openEngine } from "../../sidecar/open-engine.ts";

const NO_LIBRARY = new EngineError("cannot load libcublasLt", true);
const FULL = new EngineError("out of memory", false);

/** What starts, and what is said, where the GPU's library fails with `error`. */
async function opened(
  backend: Backend,
  error: Error | null,
  auto = "cuda",
  needsGpu = false,
): Promise<{ started: string[]; said: string[]; outcome: string }> {
  const started: string[] = [];
  const said: string[] = [];
  const start = (library: string): { ready: Promise<EngineReady> } => {
    started.push(library);
    const isFailing = error !== null && (library === "cuda.so" || auto === "cpu");
    return { ready: isFailing ? Promise.reject(error) : Promise.resolve({ fingerprint: library } as EngineReady) };
  };
  const build = async (wanted: Backend): Promise<string> => `${wanted === "auto" ? auto : wanted}.so`;
  const outcome = await openEngine({ backend, needsGpu, build, start, say: (message) => said.push(message) }).then(
    ({ ready }) => ready.fingerprint,
    (failure: Error) => failure.message,
  );
  return { started, said, outcome };
}

test("what only a GPU can do is not left to the CPU", async () => {
  const outcome = "cannot load libcublasLt";
  expect(await opened("auto", NO_LIBRARY, "cuda", true)).toEqual({ started: ["cuda.so"], said: [], outcome });
});

test("a GPU that works serves", async () => {
  expect(await opened("auto", null)).toEqual({ started: ["cuda.so"], said: [], outcome: "cuda.so" });
});

test("the CPU serves where the GPU cannot, and it is said why", async () => {
  const said = ["cannot load libcublasLt; the CPU serves"];
  expect(await opened("auto", NO_LIBRARY)).toEqual({ started: ["cuda.so", "cpu.so"], said, outcome: "cpu.so" });
});

test("a GPU that was asked for is not replaced", async () => {
  const outcome = "cannot load libcublasLt";
  expect(await opened("cuda", NO_LIBRARY)).toEqual({ started: ["cuda.so"], said: [], outcome });
});

test("what is wrong on the CPU, too, is not tried twice", async () => {
  expect((await opened("auto", FULL)).started).toEqual(["cuda.so"]);
  expect((await opened("auto", NO_LIBRARY, "cpu")).started).toEqual(["cpu.so"]);
});
