// How calls of the C ABI of native/kvasir.h end.

/** kvs_status values, see kvasir.h. */
export const Status = {
  ok: 0,
  busy: 1,
  pending: 2,
  timeout: 3,
  invalid: -1,
  outOfMemory: -2,
  unsupported: -3,
  io: -4,
  deviceFailed: -5,
  noSpace: -6,
  inUse: -7,
} as const;

/** A call that the library refused or that failed; `status` is one of Status. */
export class NativeError extends Error {
  override name = "NativeError";
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}
