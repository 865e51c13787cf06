// What a disk holds, page by page, and what of it survives: a page keeps its older versions until a sync, because a
// device that loses power may have written any of them.

import type { SeededRandom } from "./seeded-random.ts";

export const PAGE_BYTES = 4096;
const ZEROS = new Uint8Array(PAGE_BYTES);

export class DiskMedium {
  readonly #pages = new Map<number, Uint8Array>();
  /** Versions since the last sync, oldest first, without the newest. */
  readonly #older = new Map<number, Uint8Array[]>();

  read(offsetBytes: number, destination: Uint8Array): void {
    for (let done = 0; done < destination.length; ) {
      const offset = offsetBytes + done;
      const inPage = offset % PAGE_BYTES;
      const count = Math.min(PAGE_BYTES - inPage, destination.length - done);
      const page = this.#page(Math.floor(offset / PAGE_BYTES));
      destination.set(page.subarray(inPage, inPage + count), done);
      done += count;
    }
  }

  /** bytes: one page. */
  writePage(page: number, bytes: Uint8Array): void {
    const older = this.#older.get(page) ?? [];
    this.#older.set(page, [...older, this.#page(page)]);
    this.#pages.set(page, bytes.slice());
  }

  /** How many versions of each page are older than what is there now. */
  syncPoint(): ReadonlyMap<number, number> {
    return new Map([...this.#older].map(([page, versions]) => [page, versions.length]));
  }

  /** What was there at that point survives, or something younger. */
  sync(point: ReadonlyMap<number, number> = this.syncPoint()): void {
    for (const [page, count] of point) {
      const versions = (this.#older.get(page) ?? []).slice(count);
      if (versions.length === 0) this.#older.delete(page);
      else this.#older.set(page, versions);
    }
  }

  /** Nothing is left, also of older versions. */
  discard(): void {
    this.#pages.clear();
    this.#older.clear();
  }

  /** A bit rots; false when the page is all zeros, where no one would notice. */
  flipBit(page: number, bit: number): boolean {
    const bytes = this.#pages.get(page);
    if (bytes === undefined) return false;
    const copy = bytes.slice();
    copy[bit >> 3]! ^= 1 << (bit & 7);
    this.#pages.set(page, copy);
    return true;
  }

  pages(): number[] {
    return [...this.#pages.keys()].sort((a, b) => a - b);
  }

  /** What a process finds that starts after this one died. */
  afterKill(): DiskMedium {
    const copy = new DiskMedium();
    for (const [page, bytes] of this.#pages) copy.#pages.set(page, bytes);
    for (const [page, versions] of this.#older) copy.#older.set(page, versions);
    return copy;
  }

  /** What a machine finds that lost power: of each page any version since the last sync. */
  afterPowerFailure(random: SeededRandom): DiskMedium {
    const copy = new DiskMedium();
    for (const [page, bytes] of this.#pages) {
      const versions = [...(this.#older.get(page) ?? []), bytes];
      copy.#pages.set(page, versions[random.integer(0, versions.length - 1)]!);
    }
    return copy;
  }

  /** The file was cut and perhaps grown again. */
  truncate(bytes: number): void {
    const isOutside = (page: number) => page * PAGE_BYTES >= bytes;
    for (const page of [...this.#pages.keys()].filter(isOutside)) this.#pages.delete(page);
    for (const page of [...this.#older.keys()].filter(isOutside)) this.#older.delete(page);
  }

  #page(page: number): Uint8Array {
    return this.#pages.get(page) ?? ZEROS;
  }
}
