// One direction of the disk: transfers of a fixed rate, one chunk of blocks after the other. When a chunk
// is done it asks for the next, so that what is most urgent then goes first.

import type { EventQueue } from "./event-queue.ts";

export interface DiskChannelOptions<Block> {
  readonly bytesPerSecond: number;
  readonly blockBytes: number;
  /** The next chunk; empty: nothing to do. */
  readonly take: () => Block[];
  readonly onMoved: (blocks: readonly Block[]) => void;
}

export class DiskChannel<Block> {
  #isBusy = false;
  movedBlocks = 0;

  constructor(
    readonly events: EventQueue,
    readonly options: DiskChannelOptions<Block>,
  ) {}

  /** To be called when there may be something to do. */
  wake(): void {
    if (this.#isBusy) return;
    const { bytesPerSecond, blockBytes, take, onMoved } = this.options;
    const chunk = take();
    if (chunk.length === 0) return;
    this.#isBusy = true;
    this.events.after((1000 * chunk.length * blockBytes) / bytesPerSecond, () => {
      this.#isBusy = false;
      this.movedBlocks += chunk.length;
      onMoved(chunk);
      this.wake();
    });
  }
}
