// A block is named by what it means: a hash chained over everything that its numbers depend on (account and model
// fingerprint in the root, the parent block, its own token ids). Equal ids, equal KV; so blocks can be
// shared inside an account, found again after a restart, and never met by another account or model.

/** 128 bits, as 16 latin1 characters: cheap to compare and to use as a Map key. */
export type BlockId = string & { readonly brand: "BlockId" };

const ID_BYTES = 16;
const LENGTH_BYTES = 4;

/** What is hashed, and its digest: made once, as nothing waits between a hash's beginning and its end. */
let gathered = Buffer.alloc(4096);
const hashed = Buffer.alloc(32);

/** A hash of 16 bytes or more; tests weaken it to force collisions. */
export type BlockHasher = (parts: readonly (string | Uint8Array)[]) => BlockId;

/** Strings count a byte a character: ids and ASCII. A long prompt is a hundred blocks, all hashed before its first
 * token: one call over bytes gathered here takes a third of the time of a hasher fed piece by piece. */
export const sha256Hasher: BlockHasher = (parts) => {
  let end = 0;
  for (const part of parts) {
    const needed = end + LENGTH_BYTES + part.length;
    if (needed > gathered.length) gathered = Buffer.concat([gathered], 2 * needed);
    // Length first, so that ("ab", "c") and ("a", "bc") differ.
    end = gathered.writeUInt32LE(part.length, end);
    if (typeof part === "string") gathered.write(part, end, "latin1");
    else gathered.set(part, end);
    end += part.length;
  }
  Bun.SHA256.hash(gathered.subarray(0, end), hashed);
  return hashed.toString("latin1", 0, ID_BYTES) as BlockId;
};

/** Parent of an account's first blocks. digest: of the fingerprint, that is of everything that changes the numbers
 * (weights, dtypes, layout). It stands in every header, so that ids of another fingerprint can be computed, too. */
export function rootId(hash: BlockHasher, salt: Uint8Array, digest: Uint8Array): BlockId {
  return hash(["kvasir root 3", salt, digest]);
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
