// Builds both libraries and prints their paths: bun test/gpu/build.ts [compute capability ...]. With capabilities
// named, no GPU is needed: continuous integration builds for two, and a library can be made for another machine.

import { buildNative } from "../../sidecar/build-native.ts";

const capabilities = process.argv.slice(2);
const onProgress = (message: string): void => console.error(message);
const begin = performance.now();
const cuda = await buildNative("cuda", {
  onProgress,
  ...(capabilities.length > 0 ? { computeCapabilities: capabilities } : {}),
});
console.error(`the CUDA library: ${((performance.now() - begin) / 1000).toFixed(1)} s`);
console.log(`cpu=${await buildNative("cpu", { onProgress })}`);
console.log(`cuda=${cuda}`);
