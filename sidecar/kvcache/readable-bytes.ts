// Numbers of bytes as people read them, for what is said and refused.

const MIB = 2 ** 20;
const TIB_IN_MIB = 2 ** 20;

/** Whole MiB up to 10 GiB, then GiB, and TiB from 10 of them on, with one decimal. */
export function readableBytes(bytes: number): string {
  const mebibytes = bytes / MIB;
  if (mebibytes < 10 * 1024) return `${Math.round(mebibytes)} MiB`;
  if (mebibytes < 10 * TIB_IN_MIB) return `${(mebibytes / 1024).toFixed(1)} GiB`;
  return `${(mebibytes / TIB_IN_MIB).toFixed(1)} TiB`;
}
