// The host tier: slots of one mapping in this machine's memory, each with a 4 KiB header where the mapping outlives
// the process. A header is written once its slot's content is known to be whole, and emptied before the slot is used
// again, so that whoever adopts the mapping finds only what may be believed.

import { assert } from "../assert.ts";
import type { HostAddress } from "../native.ts";
import type { BlockId } from "./block-hash.ts";
import {
  type BlockHeader,
  decodeHeader,
  encodeEmptyHeader,
  encodeHeader,
  fingerprintDigest,
  HEADER_BYTES,
  headerDigest,
} from "./block-header.ts";
import { type BlockNumber, BlockPool } from "./block-pool.ts";
import type { CachedBlock } from "./cached-block.ts";
import type { FormerBlocks } from "./lost-blocks.ts";
import type { VictimOrder } from "./victim-order.ts";

export interface HostTierOptions {
  readonly slotCount: number;
  readonly slotBytes: number;
  readonly slotsAddress: HostAddress;
  /** slotCount headers in the mapping; null: it dies with the process. */
  readonly headers: Uint8Array | null;
  readonly fingerprint: string;
  /** 64-bit checksum of memory. */
  readonly checksum: (address: HostAddress, bytes: number) => bigint;
}

export interface AdoptedSlot extends BlockHeader {
  readonly slot: BlockNumber;
}

export class HostTier {
  readonly pool: BlockPool<CachedBlock>;
  readonly #digest: Uint8Array;
  /** Of adopted slots that nobody has looked at yet. */
  readonly #expectedChecksums = new Map<BlockNumber, bigint>();
  /** Slots whose header says what they hold. */
  readonly #sealed = new Set<BlockNumber>();
  /** Ready blocks whose header is still to be written. */
  readonly #unsealed = new Set<CachedBlock>();
  #generation = 1;

  constructor(
    readonly options: HostTierOptions,
    order: VictimOrder<CachedBlock>,
  ) {
    this.pool = new BlockPool(options.slotCount, order);
    this.#digest = fingerprintDigest(options.fingerprint);
  }

  get isSurviving(): boolean {
    return this.options.headers !== null;
  }

  /** Headers of ready blocks are still to be written. */
  get hasUnsealed(): boolean {
    return this.#unsealed.size > 0;
  }

  address(slot: BlockNumber): HostAddress {
    return (this.options.slotsAddress + slot * this.options.slotBytes) as HostAddress;
  }

  /** A free slot in use by the caller, its header empty; null: evict first. */
  allocate(): BlockNumber | null {
    const slot = this.pool.allocate();
    if (slot !== null) this.#unseal(slot);
    return slot;
  }

  /** The slot's content is whole: it may survive this process once seal() finds the time. */
  markReady(block: CachedBlock): void {
    if (this.isSurviving) this.#unsealed.add(block);
  }

  /** The block leaves its slot. */
  disown(block: CachedBlock): void {
    this.#unsealed.delete(block);
    this.#expectedChecksums.delete(block.host);
    // At once, not at the next use: what was deleted must not be found by whoever adopts the mapping.
    this.#unseal(block.host);
    this.pool.disown(block.host);
  }

  /** Writes headers of ready blocks, `limit` at most: each costs a checksum over the slot. Returns how many. */
  seal(limit: number): number {
    let count = 0;
    for (const block of this.#unsealed) {
      if (count >= limit) break;
      this.#unsealed.delete(block);
      this.#seal(block);
      count++;
    }
    return count;
  }

  /** An adopted block whose content nobody has checked yet, parents first. */
  nextUnverified(): CachedBlock | null {
    const [slot] = this.#expectedChecksums.keys();
    return slot === undefined ? null : this.pool.owner(slot);
  }

  /** Checks an adopted slot's content, once. */
  verify(slot: BlockNumber): boolean {
    const expected = this.#expectedChecksums.get(slot);
    if (expected === undefined) return true;
    this.#expectedChecksums.delete(slot);
    return this.options.checksum(this.address(slot), this.options.slotBytes) === expected;
  }

  /** Reads all headers of a mapping that another process left; claims the slots that it believes. */
  adopt(): { slots: AdoptedSlot[]; dropped: number; former: FormerBlocks | null } {
    const slots: AdoptedSlot[] = [];
    let dropped = 0;
    let former: { digest: Uint8Array; ids: BlockId[] } | null = null;
    for (let slot = 0; this.isSurviving && slot < this.options.slotCount; slot++) {
      const header = decodeHeader(this.#header(slot), this.#digest);
      if (header === "empty") continue;
      this.#sealed.add(slot);
      if (typeof header === "string") {
        dropped++;
        if (header === "fingerprint") {
          former ??= { digest: headerDigest(this.#header(slot)), ids: [] };
          const before = decodeHeader(this.#header(slot), former.digest);
          if (typeof before !== "string") former.ids.push(before.id);
        }
        this.#unseal(slot);
        continue;
      }
      this.#generation = Math.max(this.#generation, header.generation + 1);
      this.#expectedChecksums.set(slot, header.payloadChecksum);
      slots.push({ ...header, slot });
    }
    this.pool.claim(new Set(slots.map(({ slot }) => slot)));
    return { slots, dropped, former };
  }

  #seal(block: CachedBlock): void {
    const { slotBytes } = this.options;
    const { id, parentId, prefixCheck, depth, tokens, recencyMs, expiresAtMs, host } = block;
    assert(this.pool.owner(host) === block, "a block that left its slot is not sealed");
    encodeHeader(this.#header(host), this.#digest, {
      id,
      parentId,
      prefixCheck,
      depth,
      tokens,
      generation: this.#generation++,
      payloadChecksum: this.options.checksum(this.address(host), slotBytes),
      lastUsedAtMs: recencyMs,
      expiresAtMs,
    });
    this.#sealed.add(host);
  }

  #unseal(slot: BlockNumber): void {
    if (this.#sealed.delete(slot)) encodeEmptyHeader(this.#header(slot));
  }

  #header(slot: BlockNumber): Uint8Array {
    return this.options.headers!.subarray(slot * HEADER_BYTES, (slot + 1) * HEADER_BYTES);
  }
}
