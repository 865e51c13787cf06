// What an earlier process left in the tiers below the gpu becomes findable again, as far as its headers are believed;
// of the rest it is counted why not.

import type { BlockHeader } from "./block-header.ts";
import type { DiskTier } from "./disk-tier.ts";
import type { HostTier } from "./host-tier.ts";
import type { Residency } from "./residency.ts";

/** Of a mapping that existed before. Returns what there is to say. */
export function adoptHost(host: HostTier, residency: Residency, nowMs: number): string {
  const { slots, dropped, former } = host.adopt();
  if (former !== null) residency.lost.noteFormer(former);
  for (const slot of slots.sort(byDepth)) residency.adopt(slot, "host", slot.slot, nowMs);
  return `host tier: ${slots.length} blocks of an earlier process, ${dropped} headers not believed`;
}

/** Returns what there is to say, a line each. */
export function adoptDisk(disk: DiskTier, residency: Residency, path: string, nowMs: number): string[] {
  const { blocks, dropped, discarded, former } = disk.store.scan();
  disk.pool.claim(new Set(blocks.map(({ slot }) => slot)));
  for (const block of blocks.sort(byDepth)) residency.adopt(block, "disk", block.slot, nowMs);
  if (former !== null) residency.lost.noteFormer(former);
  else residency.lost.count("fingerprint", dropped.fingerprint);
  residency.lost.count("corrupt", dropped.corrupt);
  residency.lost.count("io", dropped.unreadable);
  const lines: string[] = [];
  if (discarded !== null && discarded !== "new") {
    const why = discarded === "corrupt" ? "its first page is not whole" : `it is of another ${discarded}`;
    lines.push(`disk tier: what ${path} held was dropped: ${why}`);
  }
  const reasons = Object.entries(dropped).filter(([, count]) => count > 0);
  const why = reasons.map(([reason, count]) => `, ${count} dropped (${reason})`).join("");
  if (blocks.length > 0 || why !== "") lines.push(`disk tier: ${blocks.length} blocks of an earlier process${why}`);
  return lines;
}

/** Parents first, so that a child finds its own. */
function byDepth(a: Pick<BlockHeader, "depth">, b: Pick<BlockHeader, "depth">): number {
  return a.depth - b.depth;
}
