// A block is named by what it means: a hash chained over everything that its numbers depend on (account and model
// fingerprint in the root, the parent block, its own token ids). Equal ids, equal KV; so blocks can be
// shared inside an account, found again after a restart, and never met by another account or model.

/** 128 bits, as 16 latin1 characters: cheap to compare and to use as a Map key. */
export type BlockId = string & { readonly brand: "BlockId" };

const ID_BYTES = 16;

/** A hash of 16 bytes or more; tests weaken it to force collisions. */
export type BlockHasher = (parts: readonly (string | Uint8Array)[]) => BlockId;

export const sha256Hasher: BlockHasher = (parts) => {
  const hasher = new Bun.CryptoHasher("sha256");
  for (const part of parts) {
    // Length first, so that ("ab", "c") and ("a", "bc") differ.
    hasher.update(`${part.length}:`);
    hasher.update(part);
  }
  return latin1(hasher.digest().subarray(0, ID_BYTES)) as BlockId;
};

/** Parent of an account's first blocks. digest: of the fingerprint, that is of everything that changes the numbers
 * (weights, dtypes, layout). It stands in every header, so that ids of another fingerprint can be computed, too. */
export function rootId(hash: BlockHasher, salt: Uint8Array, digest: Uint8Array): BlockId {
  return hash(["kvasir root 2", salt, digest]);
}

/**
 * Id of the block that follows `parent` with these token ids (a full block, or the open last one), computed in
 * `view`; null: nothing had left the view yet.
 */
export function blockId(
  hash: BlockHasher,
  parent: BlockId,
  tokens: Int32Array,
  view: BlockId | null = null,
): BlockId {
  const bytes = new Uint8Array(tokens.buffer, tokens.byteOffset, tokens.byteLength);
  return hash(view === null ? [parent, bytes] : [parent, bytes, view]);
}

/** Id of the view that arises when `count` blocks from `firstDropped` on leave `parent`; null: the first view. */
export function viewId(
  hash: BlockHasher,
  parent: BlockId | null,
  firstDropped: BlockId,
  count: number,
): BlockId {
  return hash(["kvasir view 1", parent ?? "", firstDropped, String(count)]);
}

function latin1(bytes: Uint8Array): string {
  return String.fromCharCode(...bytes);
}
