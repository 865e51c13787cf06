// What the disk tier asks of a file: native-disk.ts's Disk, or in tests a medium with faults.

import type { DiskCompletion, DiskRequest } from "../native-disk.ts";

export interface DiskIo {
  /** Returns how many of the requests were taken, from the first. */
  submit(requests: readonly DiskRequest[]): number;
  /** Completions since the last call, perhaps not all of them; none when there are none. */
  reap(): DiskCompletion[];
  /** Blocking, for start-up. Throws when the medium fails. */
  readNow(offsetBytes: number, destination: Uint8Array): void;
  /** Blocking and durable, for start-up. Throws when the medium fails. */
  writeNow(offsetBytes: number, source: Uint8Array): void;
  /** Forgets the whole content: the file reads as zeros. Blocking, for start-up, with nothing in flight. */
  discard(): void;
}
