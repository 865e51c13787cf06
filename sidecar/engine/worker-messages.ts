// What the main thread and the engine worker post to each other.

import type { DiskAdmission } from "../kvcache/background.ts";
import type { PolicyName } from "../kvcache/policy.ts";
import type { Quantization } from "../model/model.ts";
import type { FinishReason } from "../protocol.ts";
import type { EngineEvent, EngineRequest } from "./request.ts";

/** The KV cache's tiers; null stands for a default that the worker finds out. */
export interface EngineCacheOptions {
  readonly hostBytes: number | null;
  /** POSIX shared-memory name under which the host tier survives the process. */
  readonly hostName: string;
  readonly keepHostCache: boolean;
  readonly diskBytes: number | null;
  readonly diskPath: string;
  readonly diskAdmission: DiskAdmission;
  readonly diskIdleMs: number;
  readonly ioThreads: number;
  readonly tiers: "auto" | "inclusive" | "exclusive";
  readonly policy: PolicyName;
  readonly recompute: "auto" | "never";
  readonly preloadLayers: number | null;
  readonly maxLoadStallMs: number;
  readonly loadAheadBlocks: number | null;
  readonly keepBlocks: number;
  readonly truncationRatio: number;
}

/** Everything the worker needs to load the model and size its pools; plain data. */
export interface EngineWorkerOptions {
  readonly libraryPath: string;
  readonly modelDirectory: string;
  readonly randomWeights: boolean;
  readonly maxModelLen: number | null;
  readonly maxNumSeqs: number;
  readonly maxBatchTokens: number;
  readonly maxWaiting: number;
  readonly blockTokens: number;
  /** Null: sized from the memory that is free. */
  readonly gpuBlocks: number | null;
  readonly gpuMemoryBytes: number | null;
  /** Share of the device's memory that weights, workspace and KV may fill together. */
  readonly gpuMemoryUtilization: number;
  readonly kvDtype: "auto" | "f32" | "f16" | "bf16";
  readonly computeDtype: "auto" | "f32" | "f16" | "bf16";
  readonly quantization: Quantization;
  readonly threads: number;
  readonly cache: EngineCacheOptions;
  readonly gpuIndex: number;
}

export type ToEngine =
  | { readonly type: "submit"; readonly request: EngineRequest }
  | {
      readonly type: "abort";
      readonly request: number;
      readonly choice: number | null;
      readonly reason: FinishReason;
    }
  | { readonly type: "stats"; readonly nonce: number }
  | { readonly type: "forget"; readonly nonce: number; readonly blockIds: readonly string[] }
  /** `deadlineMs`: time for what is still to be written to disk. */
  | { readonly type: "stop"; readonly deadlineMs: number };

/** What the worker found out while loading. */
export interface EngineReady {
  readonly type: "ready";
  /** Device.handle, for postTo(). */
  readonly deviceHandle: number;
  readonly device: Readonly<Record<string, string | number>>;
  readonly fingerprint: string;
  readonly maxModelLen: number;
  readonly vocabSize: number;
  readonly kvDtype: string;
  readonly gpuBlocks: number;
  readonly hostSlots: number;
  readonly diskSlots: number;
  readonly isExclusive: boolean;
  readonly blockBytes: number;
  readonly loadMs: number;
}

export type FromEngine =
  | EngineReady
  | { readonly type: "progress"; readonly message: string }
  /** isUnsupported: the library cannot work on this machine at all. */
  | { readonly type: "failed"; readonly message: string; readonly isUnsupported: boolean }
  | { readonly type: "events"; readonly events: readonly EngineEvent[] }
  | { readonly type: "stats"; readonly nonce: number; readonly stats: Readonly<Record<string, number>> }
  | { readonly type: "forgotten"; readonly nonce: number; readonly blocks: Readonly<Record<string, number>> }
  | { readonly type: "stopped" };
