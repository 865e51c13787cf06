// Ids that sort by the time they were made, also when the clock does not help.

import { describe, expect, test } from "bun:test";
import { isUuid, uuidv7 } from "../../db/uuid.ts";

describe("uuidv7", () => {
  test("has the form of RFC 9562 and carries the time in its first 48 bits", () => {
    const nowMs = Date.now() + 60_000;
    const id = uuidv7(nowMs);
    expect(id).toMatch(/^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
    expect(Number.parseInt(id.replaceAll("-", "").slice(0, 12), 16)).toBe(nowMs);
  });

  test("increases strictly, within a millisecond and when the clock goes back", () => {
    const nowMs = Date.now() + 120_000;
    const ids = Array.from({ length: 2000 }, (_, i) => uuidv7(nowMs - (i % 3)));
    expect(ids).toEqual([...new Set(ids)].toSorted());
  });
});

describe("isUuid", () => {
  test("takes what uuidv7 makes and nothing that Postgres would refuse", () => {
    expect(isUuid(uuidv7())).toBe(true);
    for (const text of ["", "conv_1", "0".repeat(36), `${uuidv7()}0`, ` ${uuidv7()}`]) {
      expect(isUuid(text)).toBe(false);
    }
  });
});
