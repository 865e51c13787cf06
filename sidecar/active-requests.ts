// The requests that the engine knows: those somebody waits for, and those given up whose ends are still to come. An end
// says which blocks a request leaves behind, so it is awaited in either case.

import type { Completion } from "./completion.ts";
import type { Connection } from "./connection.ts";

/** A request in progress and whom it belongs to. */
export interface Active {
  readonly id: number;
  readonly connection: Connection;
  readonly completion: Completion;
}

export class ActiveRequests {
  readonly #wanted = new Map<number, Active>();
  readonly #leaving = new Map<number, Completion>();
  #onLeft: (() => void)[] = [];

  /** How many somebody waits for. */
  get count(): number {
    return this.#wanted.size;
  }

  add(active: Active): void {
    this.#wanted.set(active.id, active);
  }

  /** Undefined when nobody waits for it any more. */
  wanted(id: number): Active | undefined {
    return this.#wanted.get(id);
  }

  /** Undefined when it was not given up. */
  leaving(id: number): Completion | undefined {
    return this.#leaving.get(id);
  }

  of(connection: Connection): Active[] {
    return [...this.#wanted.values()].filter((active) => active.connection === connection);
  }

  /** Nobody waits for it any more. */
  giveUp({ id, completion }: Active): void {
    if (this.#wanted.delete(id)) this.#leaving.set(id, completion);
  }

  /** The engine knows it no more. */
  end(id: number): void {
    this.#wanted.delete(id);
    if (!this.#leaving.delete(id)) return;
    for (const resolve of this.#onLeft.splice(0)) resolve();
  }

  /** Resolves when none that was given up is in the engine for this conversation. */
  async whenLeft(salt: Uint8Array, conversation: string): Promise<void> {
    const isLeft = () => [...this.#leaving.values()].every(({ request }) => !isOf(request, salt, conversation));
    while (!isLeft()) await new Promise<void>((resolve) => this.#onLeft.push(resolve));
  }
}

/** The request is a turn of this conversation. */
export function isOf(request: Completion["request"], salt: Uint8Array, conversation: string): boolean {
  return request.conversation === conversation && Buffer.compare(request.salt, salt) === 0;
}
