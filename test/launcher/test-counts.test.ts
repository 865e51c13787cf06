// The one line that `npm test` ends with counts right, also when the tests crash.

import { describe, expect, test } from "bun:test";
import { addCounts, countTests } from "../../launcher/test-counts.ts";

describe("countTests", () => {
  test("reads what bun test says at its end", () => {
    expect(countTests("(pass) x\n\n 12 pass\n 0 fail\n 30 expect() calls\n", 0)).toEqual({ passed: 12, failed: 0 });
    expect(countTests(" 12 pass\n 3 fail\n 1 error\n", 1)).toEqual({ passed: 12, failed: 4 });
  });

  test("a run that ends badly without a failed test is a failure", () => {
    expect(countTests("Segmentation fault", 139)).toEqual({ passed: 0, failed: 1 });
    expect(countTests(" 2 pass\n 0 fail\n", 1)).toEqual({ passed: 2, failed: 1 });
  });

  test("adds up", () => {
    expect(addCounts({ passed: 1, failed: 2 }, { passed: 3, failed: 4 })).toEqual({ passed: 4, failed: 6 });
  });
});
