// The tiers below the gpu as they are opened: where the disk tier's file may be made.

import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { TierError, Tiers } from "../../../sidecar/kvcache/open-tiers.ts";
import { cpuLibrary } from "../../support/cpu-library.ts";
import { openTinyDevice } from "../../support/tiny-device.ts";

const device = openTinyDevice();
const folder = mkdtempSync(join(tmpdir(), "kvasir-tiers-"));

afterAll(() => {
  device.close();
  rmSync(folder, { recursive: true });
});

function open(diskPath: string): Tiers {
  const options = {
    fingerprint: "test", hostBytes: 2 ** 20, hostName: null, diskBytes: 4 * 2 ** 20, diskPath, ioThreads: 1,
    readTimeoutMs: 1000, writeTimeoutMs: 1000,
  };
  return new Tiers(cpuLibrary, device, options, () => {});
}

describe("the disk tier's folder", () => {
  test("is made where the one above it is there", () => {
    const path = join(folder, "kv-cache", "blocks");
    open(path).close(false);
    expect(existsSync(path)).toBe(true);
  });

  test("is refused where that is missing, too, such as below a disk that is not mounted", () => {
    const above = join(folder, "nvme");
    const thrown = (() => {
      try {
        return open(join(above, "kvasir", "blocks"));
      } catch (error) {
        return error;
      }
    })();
    expect(thrown).toBeInstanceOf(TierError);
    expect((thrown as Error).message).toBe(
      `the disk tier's folder cannot be made, because ${above} is not there: is its disk mounted? (--disk-path)`,
    );
    expect(existsSync(above)).toBe(false);
  });
});
