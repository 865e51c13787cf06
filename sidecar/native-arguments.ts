// Checks of what goes to the native side: bun:ffi would turn -1 into 4294967295 and a missing argument into 0 without a
// word.

import { assert, assertU32 } from "./assert.ts";

export function cString(text: string): Uint8Array {
  return new TextEncoder().encode(`${text}\0`);
}

export function assertPositive(value: number, name: string): void {
  assertU32(value, name);
  assert(value > 0, `${name} must be positive`);
}

export function assertSize(bytes: number, name: string): void {
  assert(Number.isSafeInteger(bytes) && bytes > 0, `${name} must be a positive integer, not ${bytes}`);
}

export function assertOffset(bytes: number): void {
  assert(Number.isSafeInteger(bytes) && bytes >= 0, `not a file offset: ${bytes}`);
}

export function assertAddress(address: number, name: string): void {
  assert(Number.isSafeInteger(address) && address > 0, `${name} must be an address, not ${address}`);
}

export function assertAddresses(addresses: Record<string, number>): void {
  for (const name in addresses) assertAddress(addresses[name]!, name);
}
