// What sidecars say about themselves, kept for a while: one sample a minute, from whichever edge comes first.

import { lt, sql } from "drizzle-orm";
import type { Orm } from "./client.ts";
import { sidecarStats } from "./schema.ts";

/** Samples older than this are removed by the next one. */
export const STATS_DAYS_MAX = 30;

/** Keeps the sample, unless this minute has one. The time is the database's, as edges' clocks differ. */
export async function recordSidecarStats(
  orm: Orm,
  sidecar: string,
  stats: Record<string, unknown>,
): Promise<void> {
  const takenAt = sql`date_trunc('minute', now())`;
  await orm.insert(sidecarStats).values({ sidecar, takenAt, stats }).onConflictDoNothing();
  await orm
    .delete(sidecarStats)
    .where(lt(sidecarStats.takenAt, sql`now() - make_interval(days => ${STATS_DAYS_MAX})`));
}
