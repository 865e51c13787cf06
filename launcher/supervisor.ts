// A part that is started again when it dies: others go on meanwhile, and find it under the address it had. One that
// keeps dying is given up, and with it everything: then something is wrong that a person has to look at.

import { Service, type ServiceOptions } from "./service.ts";

const RESTARTS_MAX = 3;
const WINDOW_MS = 300_000;

export interface SupervisorOptions extends ServiceOptions {
  readonly say: (message: string) => void;
}

export class Supervisor {
  readonly name: string;
  /** How it ended when it was given up, or stopped. */
  readonly exited: Promise<string>;
  readonly #options: SupervisorOptions;
  readonly #given = Promise.withResolvers<string>();
  #service: Service;
  #isStopping = false;
  /** When it died. */
  #deaths: number[] = [];

  constructor(options: SupervisorOptions) {
    this.#options = options;
    this.name = options.name;
    this.exited = this.#given.promise;
    this.#service = new Service(options);
  }

  get pid(): number | undefined {
    return this.#service.pid;
  }

  /** The URL at which it listens, now and after each restart. Throws StartError when the first start fails. */
  async ready(signal: AbortSignal): Promise<string> {
    const url = await this.#service.ready(signal);
    void this.#watch(`--port=${new URL(url).port}`);
    return url;
  }

  async stop(atOnce: AbortSignal): Promise<void> {
    this.#isStopping = true;
    await this.#service.stop(atOnce);
  }

  async #watch(portArgument: string): Promise<void> {
    for (;;) {
      const how = await this.#service.exited;
      if (this.#isStopping || !this.#mayRestart()) return this.#given.resolve(how);
      this.#options.say(`the ${this.name} ended unexpectedly (${how}): starting it again`);
      const { arguments: args } = this.#options;
      this.#service = new Service({ ...this.#options, arguments: [...args, portArgument] });
    }
  }

  #mayRestart(): boolean {
    const now = Date.now();
    this.#deaths = [...this.#deaths, now].filter((time) => now - time < WINDOW_MS);
    return this.#deaths.length <= RESTARTS_MAX;
  }
}
