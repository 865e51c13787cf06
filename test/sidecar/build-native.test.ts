// What stands in the way of the CUDA library is told in one line, and the CPU library serves where it may.

import { afterAll, describe, expect, test } from "bun:test";
import { chmodSync, existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { BuildError, buildNative } from "../../sidecar/build-native.ts";

const folder = mkdtempSync(join(tmpdir(), "kvasir-build-"));
afterAll(() => rmSync(folder, { recursive: true }));

const hasGpu = existsSync("/dev/nvidia0") || existsSync("/dev/nvidiactl");

/** A program that answers every call with `output`. */
function fakeNvcc(name: string, output: string, exitCode = 0): string {
  const path = join(folder, name);
  writeFileSync(path, `#!/bin/sh\nprintf '%s\\n' '${output}'\nexit ${exitCode}\n`);
  chmodSync(path, 0o700);
  return path;
}

async function failure(compiler: string): Promise<BuildError> {
  const building = buildNative("cuda", {
    onProgress: () => {},
    compilers: [compiler],
    computeCapabilities: ["8.0"],
    output: join(folder, "output"),
  });
  return building.then(
    () => {
      throw new Error("the build did not fail");
    },
    (error: unknown) => {
      expect(error).toBeInstanceOf(BuildError);
      return error as BuildError;
    },
  );
}

describe("the build of the CUDA library", () => {
  test("refuses an nvcc that is too old", async () => {
    const { message } = await failure(fakeNvcc("old-nvcc", "Cuda compilation tools, release 12.6, V12.6.20"));
    expect(message).toBe("nvcc 12.6 is too old: the CUDA toolkit 12.8 or newer is needed");
  });

  test("says that there is no nvcc", async () => {
    const { message } = await failure(join(folder, "no-such-nvcc"));
    expect(message).toStartWith("there is no nvcc: install the CUDA toolkit 12.8 or newer");
    expect(message).not.toContain("\n");
  });

  test("names the file that does not compile and what the compiler said", async () => {
    const nvcc = join(folder, "failing-nvcc");
    const version = "release 13.0, V13.0.88";
    const script = `case "$1" in --*) echo '${version} sm_80';; *) echo 'no luck' >&2; exit 1;; esac`;
    writeFileSync(nvcc, `#!/bin/sh\n${script}\n`);
    chmodSync(nvcc, 0o700);
    const { message } = await failure(nvcc);
    expect(message).toMatch(/^(common|cuda)\/[\w-]+\.\w+: .*failing-nvcc failed \(1\):\nno luck/);
  });

  test.skipIf(hasGpu)("needs a GPU unless told what to build for", async () => {
    const building = buildNative("cuda", { onProgress: () => {} });
    await expect(building).rejects.toThrow("there is no NVIDIA GPU here (no /dev/nvidia0): choose --backend cpu");
  });

  test.skipIf(hasGpu)("is not tried by auto without a GPU", async () => {
    const said: string[] = [];
    const path = await buildNative("auto", { onProgress: (message) => said.push(message) });
    expect(basename(path)).toStartWith("libkvasir_cpu-");
    expect(said.filter((line) => line.includes("nvcc") || line.includes("GPU"))).toEqual([]);
  });
});
