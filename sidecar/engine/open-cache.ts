// The KV cache of a loaded model, with its tiers: sizes that nobody gave are found out here, and what came of it is
// said.

import type { DiskAdmission } from "../kvcache/background.ts";
import { KvCache } from "../kvcache/kv-cache.ts";
import { Tiers } from "../kvcache/open-tiers.ts";
import { paperWindow } from "../kvcache/policy.ts";
import { TruncationRule } from "../kvcache/view.ts";
import type { Model } from "../model/model.ts";
import { NativeLibrary } from "../native.ts";
import { nowMs } from "./request.ts";
import { freeDiskBytes, freeMemoryBytes, tierSizes, totalMemoryBytes } from "./tier-size.ts";
import type { EngineWorkerOptions } from "./worker-messages.ts";

export interface OpenedCache {
  readonly cache: KvCache;
  readonly tiers: Tiers;
}

/** Shares of a tier that demotion keeps free. */
const LOW_WATERMARK = 0.03;
const HIGH_WATERMARK = 0.06;
const DISK_TIMEOUT_MS = 10_000;
/** Disk moves in flight for each I/O thread. */
const MOVES_PER_THREAD = 2;

/** The model cannot be served with these options; the message says why. */
export class CacheOptionError extends Error {
  override name = "CacheOptionError";
}

/** Throws CacheOptionError, TierError or NativeError. */
export function openCache(
  model: Model,
  gpuBlocks: number,
  options: EngineWorkerOptions,
  say: (message: string) => void,
): OpenedCache {
  const { device, maxModelLen, fingerprint } = model;
  const { blockTokens } = options;
  const { keepBlocks, truncationRatio, ioThreads } = options.cache;
  checkTruncation({ blockTokens, maxTokens: maxModelLen, keepBlocks, ratio: truncationRatio });
  const isGpu = device.info()["backend"] === "cuda";
  const sizes = tierSizes({
    wantedHostBytes: options.cache.hostBytes,
    wantedDiskBytes: options.cache.diskBytes,
    isGpu,
    freeBytes: freeMemoryBytes(),
    totalBytes: totalMemoryBytes(),
    diskFreeBytes: freeDiskBytes(options.cache.diskPath),
  });
  const tiers = new Tiers(
    new NativeLibrary(options.libraryPath),
    device,
    {
      fingerprint,
      ...sizes,
      hostName: options.cache.hostName,
      diskPath: options.cache.diskPath,
      ioThreads,
      readTimeoutMs: DISK_TIMEOUT_MS,
      writeTimeoutMs: DISK_TIMEOUT_MS,
    },
    say,
  );
  const isExclusive = options.cache.tiers === "auto" ? !isGpu : options.cache.tiers === "exclusive";
  const { blockBytes } = device.blockBytes();
  const cache = new KvCache(
    device,
    {
      blockTokens,
      blockBytes,
      layers: model.config.layers,
      gpuBlocks,
      fingerprint,
      maxTokens: maxModelLen,
      keepBlocks,
      truncationRatio,
      policy: options.cache.policy,
      windowBlocks: tiers.hostSlots + tiers.diskSlots,
      isExclusive,
      recompute: options.cache.recompute,
      preloadLayers: options.cache.preloadLayers,
      maxLoadStallMs: options.cache.maxLoadStallMs,
      background: {
        admission: options.cache.diskAdmission satisfies DiskAdmission,
        idleMs: options.cache.diskIdleMs,
        hostMarks: watermarks(tiers.hostSlots),
        gpuMarks: watermarks(gpuBlocks),
        maxReads: ioThreads * MOVES_PER_THREAD,
        maxWrites: ioThreads,
      },
    },
    (policy) => tiers.create(policy),
  );
  tiers.adopt(cache.residency, nowMs());
  describe(cache, tiers, say);
  return { cache, tiers };
}

function checkTruncation(rule: ConstructorParameters<typeof TruncationRule>[0]): void {
  if (TruncationRule.fits(rule)) return;
  const { keepBlocks, ratio, blockTokens, maxTokens } = rule;
  throw new CacheOptionError(
    `a context of ${maxTokens} tokens cannot keep ${keepBlocks} blocks of ${blockTokens} and drop ${ratio} of it: ` +
      "give a smaller --truncation-keep-blocks, --truncation-ratio or --block-tokens, or a larger --max-model-len",
  );
}

function watermarks(blocks: number): { lowBlocks: number; highBlocks: number } {
  return { lowBlocks: Math.ceil(blocks * LOW_WATERMARK), highBlocks: Math.ceil(blocks * HIGH_WATERMARK) };
}

function describe(
  { rule, options, blockCount }: KvCache,
  { hostSlots, diskSlots }: Tiers,
  say: (text: string) => void,
): void {
  const size = (blocks: number) =>
    `${blocks} blocks (${Math.round((blocks * options.blockBytes) / 2 ** 20)} MiB)`;
  const mode = options.isExclusive ? "exclusive" : "inclusive";
  say(
    `KV cache: gpu ${size(blockCount)}, host ${size(hostSlots)}, disk ${size(diskSlots)}; ` +
      `${mode} tiers, ${options.policy}`,
  );
  const sessionBytes = options.blockBytes * rule.windowBlocks;
  const prefetched = paperWindow(hostSlots * options.blockBytes, sessionBytes);
  const kept = paperWindow((hostSlots + diskSlots) * options.blockBytes, sessionBytes);
  say(`KV cache: room for ${prefetched} full conversations in host memory, ${kept} with the disk`);
}
