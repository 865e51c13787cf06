// One request on its way back to text: the tokens of each choice become UTF-8-safe text, stop strings end a choice,
// and what is ready to be sent is collected as deltas.

import type { FinishEvent, TokenEvent } from "./engine/request.ts";
import type { Remains } from "./forgetter.ts";
import type { Detokenizer, Tokenizer } from "./model/tokenizer.ts";
import type { Delta, Done, FinishReason, SubmitRequest, TokenLogprob } from "./protocol.ts";
import { StopScanner } from "./stop-strings.ts";

/** Text of one choice that waits to be sent. */
interface PendingDelta {
  text: string;
  tokenCount: number;
  logprobs: TokenLogprob[] | null;
}

/** What happened to a request through an event. */
export interface CompletionUpdate {
  /** A stop string ended this choice: the engine should stop it. */
  readonly stoppedChoice: number | null;
  /** All choices have ended. */
  readonly isDone: boolean;
}

const NOTHING: CompletionUpdate = { stoppedChoice: null, isDone: false };

export class Completion {
  readonly #choices: Choice[];
  /** What the template made of the messages; known once the prompt is prepared. */
  promptText = "";
  #tokenCount = 0;

  constructor(
    /** The edge's number for it, on its connection. */
    readonly stream: number,
    readonly request: SubmitRequest,
    readonly tokenizer: Tokenizer,
  ) {
    const { n, stop, logprobs } = request.sampling;
    this.#choices = Array.from(
      { length: n },
      () => new Choice(tokenizer, new StopScanner(stop), logprobs !== null),
    );
  }

  apply(event: TokenEvent | FinishEvent): CompletionUpdate {
    const choice = this.#choices[event.choice]!;
    if (event.type === "finish") {
      choice.finish(event);
      return { stoppedChoice: null, isDone: this.#choices.every(({ finished }) => finished !== null) };
    }
    if (choice.isStopped) return NOTHING;
    choice.push(event);
    this.#tokenCount++;
    return choice.isStopped ? { stoppedChoice: event.choice, isDone: false } : NOTHING;
  }

  /** Takes what is ready to be sent since the last call. */
  takeDeltas(): Delta[] {
    const deltas: Delta[] = [];
    this.#choices.forEach((choice, index) => {
      const pending = choice.takePending();
      if (pending === null) return;
      deltas.push([this.stream, index, pending.text, pending.tokenCount, pending.logprobs]);
    });
    return deltas;
  }

  /** The end frame; only when all choices have ended. */
  done(): Done {
    const finishes = this.#choices.map((choice) => choice.finished!);
    const first = finishes[0]!;
    return {
      usage: {
        promptTokens: first.usage.promptTokens,
        completionTokens: this.#choices.reduce((sum, { completionTokens }) => sum + completionTokens, 0),
        cachedTokens: first.usage.cachedTokens,
      },
      timings: {
        ...first.timings,
        totalMs: Math.max(...finishes.map(({ timings }) => timings.totalMs)),
      },
      cache: first.cache,
      finishReasons: this.#choices.map((choice) => choice.finishReason),
      tokenCount: this.#tokenCount,
      missReasons: { ...first.missReasons },
    };
  }

  /** What each ended choice leaves behind; text and ids of its whole conversation where the two agree exactly. */
  *remains(): Generator<Remains> {
    for (const choice of this.#choices) {
      if (choice.finished === null) continue;
      const { blockIds, tokens } = choice.finished;
      const tail = choice.lineageTail();
      const lineage = tail === null ? null : { text: this.promptText + tail, tokens, answer: choice.answer };
      yield { chains: [blockIds], lineage };
    }
  }
}

class Choice {
  finished: FinishEvent | null = null;
  isStopped = false;
  completionTokens = 0;
  readonly #detokenizer: Detokenizer;
  #pending: PendingDelta | null = null;
  #text = "";
  #byteCount = 0;
  #hasSpecialToken = false;

  constructor(
    readonly tokenizer: Tokenizer,
    readonly scanner: StopScanner,
    readonly wantsLogprobs: boolean,
  ) {
    this.#detokenizer = tokenizer.detokenizer();
  }

  get finishReason(): FinishReason {
    return this.isStopped ? "stop" : this.finished!.reason;
  }

  push(event: TokenEvent): void {
    this.completionTokens++;
    this.#byteCount += this.tokenizer.tokenBytes(event.token).length;
    this.#hasSpecialToken ||= this.tokenizer.isSpecial(event.token);
    const { text, isStopped } = this.scanner.push(this.#detokenizer.push(event.token));
    this.isStopped = isStopped;
    this.#emit(text, 1, this.wantsLogprobs ? [this.#logprobOf(event)] : null);
  }

  finish(event: FinishEvent): void {
    this.finished = event;
    if (this.isStopped) return;
    // The end token is counted by the engine but never pushed.
    this.completionTokens = event.usage.completionTokens;
    const last = this.scanner.push(this.#detokenizer.flush());
    this.isStopped = last.isStopped;
    const text = last.isStopped ? last.text : last.text + this.scanner.flush();
    if (text !== "") this.#emit(text, 0, null);
  }

  takePending(): PendingDelta | null {
    const pending = this.#pending;
    this.#pending = null;
    return pending;
  }

  /** What the client was given. */
  get answer(): string {
    return this.#text;
  }

  /** The answer's text with its end token; null when the sequence holds more than the client saw. */
  lineageTail(): string | null {
    if (this.isStopped || this.#hasSpecialToken || this.finished === null) return null;
    // Bytes of a character that was never completed are in the tokens, but not in the text.
    if (Buffer.byteLength(this.#text) !== this.#byteCount) return null;
    const { reason, tokens } = this.finished;
    if (reason === "length") return this.#text;
    const endToken = reason === "stop" ? this.tokenizer.specialText(tokens.at(-1)!) : null;
    return endToken === null ? null : this.#text + endToken;
  }

  #emit(text: string, tokenCount: number, logprobs: TokenLogprob[] | null): void {
    this.#text += text;
    if (this.#pending === null) {
      this.#pending = { text, tokenCount, logprobs };
      return;
    }
    this.#pending.text += text;
    this.#pending.tokenCount += tokenCount;
    if (logprobs === null) return;
    if (this.#pending.logprobs === null) this.#pending.logprobs = logprobs;
    else this.#pending.logprobs.push(...logprobs);
  }

  #logprobOf({ token, logprob, top }: TokenEvent): TokenLogprob {
    const named = (id: number) => {
      const bytes = this.tokenizer.tokenBytes(id);
      return { token: new TextDecoder().decode(bytes), bytes: [...bytes] };
    };
    return {
      ...named(token),
      logprob: finiteLogprob(logprob),
      top: top.map((rival) => ({ ...named(rival.id), logprob: finiteLogprob(rival.logprob) })),
    };
  }
}

/** JSON has no -Infinity; OpenAI's own stand-in for "hardly ever" is -9999. */
function finiteLogprob(logprob: number): number {
  return Number.isFinite(logprob) ? logprob : -9999;
}
