// A message that somebody else can cause as often as they like: said once in a while, and how often it was held back.

export class RareMessage {
  #saidAtMs = -Infinity;
  #heldBack = 0;

  constructor(
    readonly say: (message: string) => void,
    /** From one message to the next. */
    readonly pauseMs: number,
  ) {}

  report(message: string, nowMs: number): void {
    if (nowMs - this.#saidAtMs < this.pauseMs) {
      this.#heldBack++;
      return;
    }
    this.say(this.#heldBack === 0 ? message : `${message}; ${this.#heldBack} more like it before`);
    this.#saidAtMs = nowMs;
    this.#heldBack = 0;
  }
}
