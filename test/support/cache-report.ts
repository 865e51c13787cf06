// What the cache says about a request for which it had nothing to do, for tests to change.

import type { CacheReport } from "../../sidecar/protocol.ts";

export function cacheReport(changes: Partial<CacheReport> = {}): CacheReport {
  return {
    choice: "none",
    predictedLoadMs: null,
    predictedRecomputeMs: null,
    loadedBytes: 0,
    droppedTokens: 0,
    isViewRestarted: false,
    ...changes,
  };
}
