// The bundled model's recall set: conversations whose last question asks for something told earlier, and one
// right answer.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import {
  type ChatTemplate,
  loadChatTemplate,
  type TemplateMessage,
} from "../../sidecar/model/chat-template.ts";
import { loadTokenizer, type Tokenizer } from "../../sidecar/model/tokenizer.ts";
import type { TestModel } from "./test-model.ts";

export const BUNDLED_MODEL = join(import.meta.dir, "../../sidecar/models/kvasir-15m-chat");
/** As in the card's evaluation. */
const ANSWER_TOKENS_MAX = 40;

export interface RecallItem {
  readonly id: string;
  /** About how many tokens lie between telling and answer. */
  readonly bucket: number;
  /** Of the whole prompt, as the reference tokenizer counts. */
  readonly tokens: number;
  readonly messages: readonly TemplateMessage[];
  readonly expected: string;
}

export function readRecall(): RecallItem[] {
  const lines = gunzipSync(readFileSync(join(BUNDLED_MODEL, "eval/recall.jsonl.gz"))).toString();
  return lines.trimEnd().split("\n").map((line) => JSON.parse(line) as RecallItem);
}

export class RecallRunner {
  private constructor(
    readonly model: TestModel,
    readonly tokenizer: Tokenizer,
    readonly template: ChatTemplate,
  ) {}

  static async create(model: TestModel): Promise<RecallRunner> {
    return new RecallRunner(model, await loadTokenizer(BUNDLED_MODEL), await loadChatTemplate(BUNDLED_MODEL));
  }

  /** The greedy answer to an item's last question. */
  answer({ messages }: RecallItem): string {
    this.model.reset();
    const prompt = this.tokenizer.encode(this.template.render(messages, { addGenerationPrompt: true }));
    const { eosTokens } = this.model.model;
    const isEnd = (id: number): boolean => eosTokens.has(id);
    const ids = this.model.greedy(this.model.sequence(), prompt, ANSWER_TOKENS_MAX, isEnd);
    return this.tokenizer.decode(ids).trim();
  }
}
