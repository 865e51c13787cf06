// Weights come from disk at its speed only when it never waits: so what will be read next is asked for while the device
// takes what was read last. Advice costs nothing where the file is in memory already.

/** Bytes [beginByte, endByte) of an open file. */
export interface FileRange {
  readonly descriptor: number;
  readonly beginByte: number;
  readonly endByte: number;
}

type Advise = (descriptor: number, offsetBytes: number, bytes: number) => void;

/** Enough for the disk to be busy, and little beside the weights themselves. */
const WINDOW_BYTES = 256 * 2 ** 20;
/** Of one piece of advice. */
const PIECE_BYTES = 8 * 2 ** 20;

export class ReadAhead {
  #range = 0;
  /** Of the range: from here on nothing was asked for yet. */
  #offset = 0;
  #askedBytes = 0;
  #readBytes = 0;

  /** ranges: in the order in which they will be read. */
  constructor(
    readonly ranges: readonly FileRange[],
    readonly advise: Advise,
    readonly windowBytes = WINDOW_BYTES,
  ) {}

  /** So many more bytes were read; asks for what lies within the window from there. */
  advance(bytes: number): void {
    this.#readBytes += bytes;
    while (this.#askedBytes < this.#readBytes + this.windowBytes && this.#range < this.ranges.length) this.#askNext();
  }

  #askNext(): void {
    const { descriptor, beginByte, endByte } = this.ranges[this.#range]!;
    const begin = beginByte + this.#offset;
    const bytes = Math.min(PIECE_BYTES, endByte - begin);
    if (bytes > 0) this.advise(descriptor, begin, bytes);
    this.#askedBytes += bytes;
    this.#offset += bytes;
    if (begin + bytes < endByte) return;
    this.#range++;
    this.#offset = 0;
  }
}
