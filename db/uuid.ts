// UUIDv7 (RFC 9562, section 5.7): ids that sort by the time they were made. Bun has a builtin, Deno
// has none, and both run this file. Ids of one process are strictly increasing: within a millisecond
// the 74 bits after the timestamp count upward from a random start (section 6.2, method 2).

/** Highest value of the 74 counter bits that leaves room for a millisecond's worth of ids. */
const COUNTER_START_BITS = 73n;
const COUNTER_MAX = (1n << 74n) - 1n;

let lastMs = 0;
let counter = 0n;

/** A new id, greater than every id this process made before, in the usual 36 characters. */
export function uuidv7(nowMs = Date.now()): string {
  if (nowMs > lastMs) {
    lastMs = nowMs;
    counter = randomBits(COUNTER_START_BITS);
  } else if (counter === COUNTER_MAX) {
    lastMs += 1; // the clock stood still for 2^73 ids, or went back: run ahead of it
    counter = randomBits(COUNTER_START_BITS);
  } else {
    counter += 1n;
  }
  const randA = counter >> 62n;
  const randB = counter & ((1n << 62n) - 1n);
  const value = (BigInt(lastMs) << 80n) | (7n << 76n) | (randA << 64n) | (2n << 62n) | randB;
  const hex = value.toString(16).padStart(32, "0");
  return [8, 12, 16, 20, 32].map((end, i) => hex.slice([0, 8, 12, 16, 20][i], end)).join("-");
}

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i;

/** True for text that Postgres would take as a uuid in its canonical form. */
export function isUuid(text: string): boolean {
  return UUID.test(text);
}

function randomBits(bits: bigint): bigint {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  let value = 0n;
  for (const byte of bytes) value = (value << 8n) | BigInt(byte);
  return value & ((1n << bits) - 1n);
}
