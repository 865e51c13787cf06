// The cache in numbers, for the stats frame: how full the tiers are, what moved, what was found and why not.

import type { KvCache } from "./kv-cache.ts";

/** Counts since the start, and present sizes in blocks; names end in their unit. */
export function cacheStats(cache: KvCache): Record<string, number> {
  const { residency, background, costs } = cache;
  const { host, disk } = residency.tiers;
  const stats: Record<string, number> = {
    gpuBlocks: cache.blockCount,
    gpuBlocksAvailable: cache.availableBlocks,
    hostBlocks: host?.pool.blockCount ?? 0,
    hostBlocksUsed: host === null ? 0 : host.pool.blockCount - host.pool.freeCount,
    diskBlocks: disk?.pool.blockCount ?? 0,
    diskBlocksUsed: disk === null ? 0 : disk.pool.blockCount - disk.pool.freeCount,
    cachedBlocks: residency.index.size,
    queriedTokens: cache.queriedTokens,
    hitTokens: cache.hitTokens,
    ...residency.counters,
    expiredBlocks: background.expiredBlocks,
    prefetchedBlocks: background.prefetchedBlocks,
    diskReadBytes: disk?.readBytes ?? 0,
    diskWrittenBytes: disk?.writtenBytes ?? 0,
    diskFailures: disk?.failureCount ?? 0,
    movesInFlight: cache.moves.inFlight,
    windowBlocks: cache.policy.windowCount,
    loadBytesPerMs: costs.loadRate.perMs ?? 0,
    readBytesPerMs: costs.readRate.perMs ?? 0,
    stepMsPerRow: costs.stepTimes.msPerRow ?? 0,
    stepMsOfOneRow: costs.stepTimes.expectedMs(1) ?? 0,
  };
  for (const [reason, count] of residency.lost.counts) stats[`lostBlocks_${reason}`] = count;
  return stats;
}
