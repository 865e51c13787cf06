// Slots have their own places in the file, keep them when it grows, and the file says whose it is.

import { describe, expect, test } from "bun:test";
import { fingerprintDigest, HEADER_BYTES } from "../../../sidecar/kvcache/block-header.ts";
import {
  describeDiskLimit,
  DISK_SLOTS_MAX,
  diskFileBytes,
  diskSlotCount,
  encodeFilePage,
  GROUP_SLOTS,
  headerOffset,
  payloadOffset,
  readFilePage,
} from "../../../sidecar/kvcache/disk-layout.ts";

const SIZES = [1, 2, 255, 256, 257, 512, 700];

describe("disk layout", () => {
  test.each(SIZES)("%i slots: no two parts of the file overlap, and all lie within it", (slotCount) => {
    const slotBytes = 12_288;
    const parts = [[0, HEADER_BYTES]];
    for (let slot = 0; slot < slotCount; slot++) {
      parts.push([headerOffset(slot, slotBytes), HEADER_BYTES], [payloadOffset(slot, slotBytes), slotBytes]);
    }
    parts.sort((a, b) => a[0]! - b[0]!);
    parts.forEach(([offset, bytes], i) => {
      const end = parts[i + 1]?.[0] ?? diskFileBytes(slotCount, slotBytes);
      expect(offset! + bytes!).toBeLessThanOrEqual(end);
      expect(offset! % 4096).toBe(0);
    });
  });

  test.each(SIZES)("as many slots as fit: %i and not one more", (slotCount) => {
    const bytes = diskFileBytes(slotCount, 8192);
    expect(diskSlotCount(bytes, 8192)).toBe(slotCount);
    expect(diskSlotCount(bytes - 1, 8192)).toBe(slotCount - 1);
  });

  test("a file too small for one slot has none, and tiny blocks are limited in number", () => {
    expect([0, 4096, 2 ** 20].map((bytes) => diskSlotCount(bytes, 8192))).toEqual([0, 0, 0]);
    expect(diskSlotCount(2 ** 40, 8192)).toBe(DISK_SLOTS_MAX);
  });

  test("that a file is larger than its slots may be is said, with what is used of it", () => {
    const most = diskFileBytes(DISK_SLOTS_MAX, 2 ** 18);
    expect(describeDiskLimit(most, 2 ** 18)).toBeNull();
    expect(describeDiskLimit(most + 2 ** 18 - 1, 2 ** 18)).toBeNull();
    expect(describeDiskLimit(999 * 2 ** 40, 2 ** 18)).toBe(
      "disk tier: 260.0 GiB of 999.0 TiB are used, because it has at most 1048576 blocks: " +
        "a larger --block-tokens makes more of it",
    );
  });

  test("the headers of a group are neighbours", () => {
    expect(headerOffset(GROUP_SLOTS - 1, 8192) - headerOffset(0, 8192)).toBe((GROUP_SLOTS - 1) * HEADER_BYTES);
  });

  const digest = fingerprintDigest("model");

  test("the first page knows its owner", () => {
    const page = encodeFilePage(8192, digest);
    expect(readFilePage(page, 8192, digest)).toBe("ours");
    expect(readFilePage(page, 12_288, digest)).toBe("slot-size");
    expect(readFilePage(page, 8192, fingerprintDigest("model 2"))).toBe("fingerprint");
    expect(readFilePage(new Uint8Array(HEADER_BYTES), 8192, digest)).toBe("new");
  });

  test("the first page of another version is recognised, and every flipped bit is noticed", () => {
    const page = encodeFilePage(8192, digest);
    for (let bit = 0; bit < HEADER_BYTES * 8; bit++) {
      page[bit >> 3]! ^= 1 << (bit & 7);
      expect(readFilePage(page, 8192, digest)).toBe("corrupt");
      page[bit >> 3]! ^= 1 << (bit & 7);
    }
    new DataView(page.buffer).setUint32(8, 99, true);
    new DataView(page.buffer).setBigUint64(HEADER_BYTES - 8, Bun.hash.xxHash64(page.subarray(0, -8)), true);
    expect(readFilePage(page, 8192, digest)).toBe("version");
  });
});
