// A device of the CPU library that computes nothing, for tests that need its host memory.

import type { Device } from "../../sidecar/native.ts";
import { cpuLibrary } from "./cpu-library.ts";

export function openTinyDevice(): Device {
  return cpuLibrary.openDevice({
    layers: 1,
    hiddenSize: 16,
    heads: 1,
    kvHeads: 1,
    headDim: 16,
    rotaryDim: 16,
    vocabSize: 16,
    blockTokens: 8,
    maxPositions: 8,
    maxRows: 1,
    maxSequences: 1,
    computeDtype: "f32",
    kvDtype: "bf16",
    attentionScale: 1,
    threadCount: 1,
    isa: "best",
    gpuIndex: 0,
  });
}
