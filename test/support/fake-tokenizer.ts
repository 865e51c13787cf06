// A tokenizer whose ids can be read: one id per byte, or per pair of bytes, one for a very long text, and two special
// tokens. Encoding always takes single bytes, so the others are ids that only a model would choose.

import { Detokenizer, type Tokenizer } from "../../sidecar/model/tokenizer.ts";

export const START = 1;
export const END = 2;
export const FAKE_SPECIALS: ReadonlyMap<string, number> = new Map([["<start>", START], ["<end>", END]]);
/** Stands for 64 KiB of text, so that few tokens fill a socket. */
export const LONG = 3;
const LONG_BYTES = Buffer.alloc(64 * 1024, "x");
const FIRST_BYTE = 10;
const FIRST_PAIR = 1000;
export const FAKE_TOKENIZER_VOCAB = FIRST_PAIR + 2 ** 16;

export function byteToken(byte: number): number {
  return FIRST_BYTE + byte;
}

export function pairToken(first: number, second: number): number {
  return FIRST_PAIR + first * 256 + second;
}

class FakeTokenizer {
  readonly specialTokens = FAKE_SPECIALS;

  encode(text: string): Int32Array {
    const ids: number[] = [];
    for (const part of text.split(/(<start>|<end>)/)) {
      const special = FAKE_SPECIALS.get(part);
      if (special !== undefined) ids.push(special);
      else for (const byte of Buffer.from(part)) ids.push(byteToken(byte));
    }
    return Int32Array.from(ids);
  }

  async encodeAsync(text: string): Promise<Int32Array> {
    return this.encode(text);
  }

  isSpecial(id: number): boolean {
    return id === START || id === END;
  }

  specialText(id: number): string | null {
    return [...FAKE_SPECIALS].find(([, special]) => special === id)?.[0] ?? null;
  }

  tokenBytes(id: number): Uint8Array {
    const special = this.specialText(id);
    if (special !== null) return Buffer.from(special);
    if (id === LONG) return LONG_BYTES;
    if (id < FIRST_PAIR) return Uint8Array.of(id - FIRST_BYTE);
    return Uint8Array.of((id - FIRST_PAIR) >> 8, (id - FIRST_PAIR) & 255);
  }

  detokenizer(): Detokenizer {
    return new Detokenizer(this as unknown as Tokenizer);
  }
}

export function fakeTokenizer(): Tokenizer {
  return new FakeTokenizer() as unknown as Tokenizer;
}

/** Ids of `text`, cut into single bytes and pairs as `wantsPair` says. */
export function modelIds(text: string | Uint8Array, wantsPair: () => boolean): number[] {
  const bytes = Buffer.from(text as string);
  const ids: number[] = [];
  for (let i = 0; i < bytes.length; ) {
    const isPair = i + 1 < bytes.length && wantsPair();
    ids.push(isPair ? pairToken(bytes[i]!, bytes[i + 1]!) : byteToken(bytes[i]!));
    i += isPair ? 2 : 1;
  }
  return ids;
}
