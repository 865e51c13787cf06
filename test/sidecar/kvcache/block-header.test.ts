// A header says exactly what was written into it, or it is not believed.

import { describe, expect, test } from "bun:test";
import { AssertionError } from "../../../sidecar/assert.ts";
import {
  type BlockHeader,
  decodeHeader,
  encodeEmptyHeader,
  encodeHeader,
  fingerprintDigest,
  HEADER_BYTES,
  HEADER_TOKENS_MAX,
} from "../../../sidecar/kvcache/block-header.ts";
import { testId, testIdentity } from "../../support/disk-harness.ts";
import { SeededRandom, testSeed } from "../../support/seeded-random.ts";

const DIGEST = fingerprintDigest("model");

function encode(header: Partial<BlockHeader> = {}): Uint8Array {
  const bytes = new Uint8Array(HEADER_BYTES).fill(0xff);
  encodeHeader(bytes, DIGEST, { ...testIdentity(7), generation: 12, payloadChecksum: 2n ** 64n - 1n, ...header });
  return bytes;
}

describe("block header", () => {
  test("comes back as it was", () => {
    const ids = { id: "\u0000\u00ff0123456789abcd" as BlockHeader["id"], parentId: testId(8) };
    const tokens = Int32Array.from({ length: HEADER_TOKENS_MAX }, (_, i) => (i % 2 === 0 ? i : -i));
    const limits = { prefixCheck: 2n ** 64n - 1n, depth: 2 ** 32 - 1, expiresAtMs: Infinity };
    expect(decodeHeader(encode({ ...ids, tokens, ...limits }), DIGEST)).toEqual({
      ...ids,
      ...limits,
      tokens,
      generation: 12,
      payloadChecksum: 2n ** 64n - 1n,
      lastUsedAtMs: 5007,
    });
  });

  test("is empty when all is zero, as in a fresh file", () => {
    const bytes = encode();
    encodeEmptyHeader(bytes);
    expect(bytes).toEqual(new Uint8Array(HEADER_BYTES));
    expect(decodeHeader(bytes, DIGEST)).toBe("empty");
    bytes[HEADER_BYTES - 1] = 1;
    expect(decodeHeader(bytes, DIGEST)).toBe("corrupt");
  });

  test("of another model is recognised", () => {
    expect(decodeHeader(encode(), fingerprintDigest("model 2"))).toBe("fingerprint");
  });

  test("of another format version is recognised", () => {
    const bytes = encode();
    new DataView(bytes.buffer).setUint32(8, 99, true);
    new DataView(bytes.buffer).setBigUint64(HEADER_BYTES - 8, Bun.hash.xxHash64(bytes.subarray(0, -8)), true);
    expect(decodeHeader(bytes, DIGEST)).toBe("version");
  });

  test("every single flipped bit is noticed", () => {
    const bytes = encode();
    for (let bit = 0; bit < HEADER_BYTES * 8; bit++) {
      bytes[bit >> 3]! ^= 1 << (bit & 7);
      expect(decodeHeader(bytes, DIGEST)).toBe("corrupt");
      bytes[bit >> 3]! ^= 1 << (bit & 7);
    }
    expect(decodeHeader(bytes, DIGEST)).toMatchObject({ generation: 12 });
  });

  test("a token count that does not fit is not believed, even under a right checksum", () => {
    const bytes = encode();
    for (const count of [0, HEADER_TOKENS_MAX + 1, 2 ** 32 - 1]) {
      new DataView(bytes.buffer).setUint32(12, count, true);
      new DataView(bytes.buffer).setBigUint64(HEADER_BYTES - 8, Bun.hash.xxHash64(bytes.subarray(0, -8)), true);
      expect(decodeHeader(bytes, DIGEST)).toBe("corrupt");
    }
  });

  const seed = testSeed();
  test(`garbage is never a block (SEED=${seed})`, () => {
    const random = new SeededRandom(seed);
    const whole = encode();
    for (let round = 0; round < 2000; round++) {
      const garbage = new Uint8Array(HEADER_BYTES).map(() => random.next() * 256);
      // Parts of a real header in it: the magic, then more and more of the rest.
      garbage.set(whole.subarray(0, random.integer(0, HEADER_BYTES - 1)));
      expect(decodeHeader(garbage, DIGEST)).toBe("corrupt");
    }
  });

  test("is refused for a block of no or too many tokens, and for an id of another length", () => {
    expect(() => encode({ tokens: new Int32Array(0) })).toThrow(AssertionError);
    expect(() => encode({ tokens: new Int32Array(HEADER_TOKENS_MAX + 1) })).toThrow(AssertionError);
    expect(() => encode({ id: "short" as BlockHeader["id"] })).toThrow(AssertionError);
  });
});
