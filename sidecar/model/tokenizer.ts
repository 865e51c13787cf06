// Text to token ids and back. Encoding is @huggingface/tokenizers, long texts in a worker so that sockets
// never wait for them; decoding is by bytes of tokens, so that a character split over tokens is only emitted
// whole.
//
// A rendered prompt is encoded as one text, as the reference implementation and other servers do: special
// tokens that a user types are special tokens. Templates that must not allow it have to say so themselves.

import { join } from "node:path";
import { Tokenizer as HfTokenizer } from "@huggingface/tokenizers";
import { assert } from "../assert.ts";
import { JsonFields } from "./json-fields.ts";
import { ModelError } from "./model-error.ts";
import { readTokenDecoder, type TokenToBytes } from "./token-bytes.ts";

/** Up to here encoding takes about a millisecond, less than a round trip to the worker. */
const INLINE_CHARACTERS_MAX = 2000;

/** Throws ModelError. */
export async function loadTokenizer(directory: string): Promise<Tokenizer> {
  return new Tokenizer(directory);
}

/** The library's tokenizer, for this file and its worker. Throws ModelError. */
export function loadHfTokenizer(directory: string): { tokenizer: HfTokenizer; fields: JsonFields } {
  const file = join(directory, "tokenizer.json");
  const fields = JsonFields.read(file);
  try {
    return { tokenizer: new HfTokenizer(fields.values, readConfig(directory)), fields };
  } catch (error) {
    throw new ModelError(file, "", `cannot be used: ${(error as Error).message}`);
  }
}

export function encodeWith(tokenizer: HfTokenizer, text: string): Int32Array {
  return Int32Array.from(tokenizer.encode(text, { add_special_tokens: false }).ids);
}

export class Tokenizer {
  /** Content -> id of the tokens that are marked special. */
  readonly specialTokens: ReadonlyMap<string, number>;
  readonly #tokenizer: HfTokenizer;
  readonly #specialText = new Map<number, string>();
  readonly #addedBytes = new Map<number, Uint8Array>();
  readonly #tokenToBytes: TokenToBytes;
  #worker: EncodeWorker | null = null;

  constructor(readonly directory: string) {
    const { tokenizer, fields } = loadHfTokenizer(directory);
    this.#tokenizer = tokenizer;
    this.#tokenToBytes = readTokenDecoder(fields);
    const specialTokens = new Map<string, number>();
    for (const [id, { content, special }] of tokenizer.get_added_tokens_decoder()) {
      this.#addedBytes.set(id, new TextEncoder().encode(content));
      if (!special) continue;
      specialTokens.set(content, id);
      this.#specialText.set(id, content);
    }
    this.specialTokens = specialTokens;
  }

  /** Special tokens in the text become their ids; none are added. */
  encode(text: string): Int32Array {
    return encodeWith(this.#tokenizer, text);
  }

  /** encode(), off this thread where the text is long. Rejects when the worker fails or the tokenizer is
   * closed. */
  async encodeAsync(text: string): Promise<Int32Array> {
    if (text.length <= INLINE_CHARACTERS_MAX) return this.encode(text);
    if (this.#worker === null || this.#worker.isBroken) this.#worker = new EncodeWorker(this.directory);
    return this.#worker.encode(text);
  }

  isSpecial(id: number): boolean {
    return this.#specialText.has(id);
  }

  /** Null when the token is not special. */
  specialText(id: number): string | null {
    return this.#specialText.get(id) ?? null;
  }

  /** Bytes of a token, special ones as written; empty for ids that the vocabulary does not name. */
  tokenBytes(id: number): Uint8Array {
    const added = this.#addedBytes.get(id);
    if (added !== undefined) return added;
    const token = this.#tokenizer.id_to_token(id);
    return token === undefined ? new Uint8Array(0) : this.#tokenToBytes(token);
  }

  detokenizer(): Detokenizer {
    return new Detokenizer(this);
  }

  /** The text of a whole answer, special tokens left out. */
  decode(ids: Iterable<number>): string {
    const detokenizer = this.detokenizer();
    let text = "";
    for (const id of ids) text += detokenizer.push(id);
    return text + detokenizer.flush();
  }

  close(): void {
    this.#worker?.close();
    this.#worker = null;
  }
}

/** Tokens in, text out; what is emitted is always whole UTF-8 and never taken back. */
export class Detokenizer {
  #decoder = newDecoder();

  constructor(readonly tokenizer: Tokenizer) {}

  /** The text that became certain with this token; "" for special ones. */
  push(id: number): string {
    if (this.tokenizer.isSpecial(id)) {
      this.flush();
      return "";
    }
    return this.#decoder.decode(this.tokenizer.tokenBytes(id), { stream: true });
  }

  /** Ends the text. Bytes of an unfinished character are dropped: they stand for nothing. */
  flush(): string {
    this.#decoder = newDecoder();
    return "";
  }
}

function newDecoder(): TextDecoder {
  return new TextDecoder("utf-8", { ignoreBOM: true });
}

/** Messages to tokenizer-worker.ts, and back. */
export interface EncodeRequest {
  readonly id: number;
  readonly text: string;
}
export type EncodeReply =
  | { readonly id: number; readonly tokens: Int32Array }
  | { readonly id: number; readonly error: string };

interface Waiting {
  readonly resolve: (tokens: Int32Array) => void;
  readonly reject: (error: Error) => void;
}

class EncodeWorker {
  /** It failed, and answers no more. */
  isBroken = false;
  readonly #worker: Worker;
  readonly #waiting = new Map<number, Waiting>();
  #nextId = 0;

  constructor(directory: string) {
    this.#worker = new Worker(new URL("./tokenizer-worker.ts", import.meta.url));
    this.#worker.postMessage(directory);
    this.#worker.onmessage = ({ data }: MessageEvent<EncodeReply>) => {
      const waiting = this.#waiting.get(data.id);
      assert(waiting !== undefined, "the tokenizer worker answers what was asked");
      this.#waiting.delete(data.id);
      if ("error" in data) waiting.reject(new Error(data.error));
      else waiting.resolve(data.tokens);
    };
    this.#worker.onerror = ({ message }: ErrorEvent) => {
      this.isBroken = true;
      this.#worker.terminate();
      this.#failAll(`the tokenizer worker failed: ${message}`);
    };
  }

  encode(text: string): Promise<Int32Array> {
    const { promise, resolve, reject } = Promise.withResolvers<Int32Array>();
    const id = this.#nextId++;
    this.#waiting.set(id, { resolve, reject });
    this.#worker.postMessage({ id, text } satisfies EncodeRequest);
    return promise;
  }

  close(): void {
    this.#worker.terminate();
    this.#failAll("the tokenizer was closed");
  }

  #failAll(message: string): void {
    for (const { reject } of this.#waiting.values()) reject(new Error(message));
    this.#waiting.clear();
  }
}

function readConfig(directory: string): Readonly<Record<string, unknown>> {
  return JsonFields.readOptional(join(directory, "tokenizer_config.json"))?.values ?? {};
}
