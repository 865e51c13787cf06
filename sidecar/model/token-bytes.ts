// What each token stands for, in bytes: the one thing that streaming text, logprobs and stop strings need.
// Byte-level BPE writes bytes as printable characters; sentencepiece writes spaces as U+2581 and rare bytes
// as <0xNN>.

import type { JsonFields } from "./json-fields.ts";

export type TokenToBytes = (token: string) => Uint8Array;

const SENTENCEPIECE_PARTS = new Set(["Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"]);

/** Reads the "decoder" of tokenizer.json. Throws ModelError for kinds that are no concatenation of tokens. */
export function readTokenDecoder(tokenizer: JsonFields): TokenToBytes {
  const decoder = tokenizer.fields("decoder");
  const parts = decoder === null ? [] : flatten(decoder);
  const types = parts.map((part) => part.text("type"));
  if (types.includes("ByteLevel")) return byteLevel();
  const unknown = types.find((type) => !SENTENCEPIECE_PARTS.has(type));
  if (unknown !== undefined) tokenizer.refuse("decoder", `"${unknown}" is not supported`);
  return sentencepiece(parts);
}

function flatten(decoder: JsonFields): JsonFields[] {
  if (decoder.text("type") !== "Sequence") return [decoder];
  const parts = decoder.values["decoders"];
  if (!Array.isArray(parts)) decoder.refuse("decoders", "must be a list");
  return parts.map((part, i) => decoder.nested(`decoders.${i}`, part));
}

/** GPT-2's table: printable Latin-1 characters stand for their byte, the others for U+0100 and up. */
function byteLevel(): TokenToBytes {
  const byteOf = new Map<string, number>();
  let moved = 0;
  for (let byte = 0; byte < 256; byte++) {
    const isPrintable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
    byteOf.set(String.fromCodePoint(isPrintable ? byte : 256 + moved++), byte);
  }
  return (token) => {
    const bytes: number[] = [];
    for (const character of token) {
      const byte = byteOf.get(character);
      // A character outside the table stands for itself, as in the reference implementation.
      if (byte === undefined) return new TextEncoder().encode(token);
      bytes.push(byte);
    }
    return Uint8Array.from(bytes);
  };
}

function sentencepiece(parts: readonly JsonFields[]): TokenToBytes {
  const replacements = parts.flatMap((part) => replacementOf(part));
  const hasByteFallback = parts.some((part) => part.text("type") === "ByteFallback");
  return (token) => {
    const byte = hasByteFallback ? /^<0x([0-9A-Fa-f]{2})>$/.exec(token) : null;
    if (byte !== null) return Uint8Array.of(Number.parseInt(byte[1]!, 16));
    const text = replacements.reduce((soFar, [from, to]) => soFar.replaceAll(from, to), token);
    return new TextEncoder().encode(text);
  };
}

function replacementOf(part: JsonFields): [from: string, to: string][] {
  switch (part.text("type")) {
    case "Metaspace":
      return [[part.text("replacement", "\u2581"), " "]];
    case "Replace": {
      const pattern = part.fields("pattern");
      if (pattern === null || !pattern.has("String")) part.refuse("pattern", "only a String is supported");
      return [[pattern.text("String"), part.text("content")]];
    }
    default:
      return [];
  }
}
