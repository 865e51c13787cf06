// How large the tiers below the gpu are when nobody says, and what is refused when somebody does.

import { expect, test } from "bun:test";
import { tierSizes, type TierSizeInput } from "../../../sidecar/engine/tier-size.ts";

const GIB = 2 ** 30;
const CPU: TierSizeInput = {
  wantedHostBytes: null, wantedDiskBytes: null, isGpu: false, freeBytes: 5 * GIB, totalBytes: 16 * GIB,
  diskFreeBytes: 40 * GIB,
};

test("a share of what is free, more of it where there is a GPU", () => {
  expect(tierSizes(CPU)).toEqual({ hostBytes: GIB / 2, diskBytes: 2 * GIB });
  expect(tierSizes({ ...CPU, isGpu: true })).toEqual({ hostBytes: 3 * GIB, diskBytes: 10 * GIB });
});

test("what was asked for, even if it is not free now, but no more than there is", () => {
  const wanted = (wantedHostBytes: number) => tierSizes({ ...CPU, wantedHostBytes }).hostBytes;
  expect(wanted(0)).toBe(0);
  expect(wanted(16 * GIB)).toBe(16 * GIB);
  expect(() => wanted(999 * 2 ** 40)).toThrow(
    "the host tier wants 999.0 TiB, but there are only 16.0 GiB of memory: " +
      "give a smaller --host-memory, or --host-memory 0 for none",
  );
});
