// The CPU library, built when its sources are newer; the same file for all tests of a run.

import { buildNative } from "../../sidecar/build-native.ts";
import { NativeLibrary } from "../../sidecar/native.ts";

export const cpuLibraryPath = await buildNative("cpu", { onProgress: () => {} });
export const cpuLibrary = new NativeLibrary(cpuLibraryPath);
