// Bytes for people: the unit follows from the size.

import { expect, test } from "bun:test";
import { readableBytes } from "../../../sidecar/kvcache/readable-bytes.ts";

test("bytes are told in a unit that leaves few digits", () => {
  const told = [0, 1.6 * 2 ** 20, 2 ** 33, 12.25 * 2 ** 30, 2 ** 40, 999 * 2 ** 40].map(readableBytes);
  expect(told).toEqual(["0 MiB", "2 MiB", "8192 MiB", "12.3 GiB", "1024.0 GiB", "999.0 TiB"]);
});
