// Command-line options as data: one table per program, from which parsing, defaults, environment variables and --help
// follow. The launcher joins the tables, so an option is described once.

import { parseArgs } from "node:util";

/** One option. All values are strings here; each program turns them into its frozen config. */
export interface OptionSpec {
  /** Without the dashes, e.g. "max-model-len". */
  readonly flag: string;
  /** Placeholder in the help text; null: a switch without a value. */
  readonly value: string | null;
  /** Shown as the default; null: none. */
  readonly fallback: string | null;
  /** Environment variable that stands in for the flag. */
  readonly env?: string;
  readonly help: string;
}

/** An option that cannot be used; the message is for the person who typed it. */
export class OptionError extends Error {
  override name = "OptionError";
}

/** Values by flag: command line first, then environment, then fallback. Switches are "true" or absent. */
export class OptionValues {
  readonly #values: ReadonlyMap<string, string>;
  /** By flag: the variable that its value came from. */
  readonly #variables: ReadonlyMap<string, string>;

  /** Throws OptionError for unknown flags and missing values. */
  constructor(
    specs: readonly OptionSpec[],
    argv: readonly string[],
    env: Readonly<Record<string, string | undefined>>,
  ) {
    const given = parse(specs, argv);
    const values = new Map<string, string>();
    const variables = new Map<string, string>();
    for (const spec of specs) {
      const fromEnv = spec.env === undefined ? undefined : env[spec.env];
      if (given[spec.flag] === "") throw new OptionError(`--${spec.flag} must not be empty`);
      const value = given[spec.flag] ?? (fromEnv === "" ? undefined : fromEnv) ?? spec.fallback;
      if (typeof value === "string") values.set(spec.flag, value);
      if (value === true) values.set(spec.flag, "true");
      if (given[spec.flag] === undefined && fromEnv) variables.set(spec.flag, spec.env!);
    }
    this.#values = values;
    this.#variables = variables;
  }

  /** Where the value came from, for messages: the variable, or the flag with its dashes. */
  source(flag: string): string {
    return this.#variables.get(flag) ?? `--${flag}`;
  }

  text(flag: string): string {
    const value = this.#values.get(flag);
    if (value === undefined) throw new OptionError(`--${flag} is required`);
    return value;
  }

  optionalText(flag: string): string | null {
    return this.#values.get(flag) ?? null;
  }

  isSet(flag: string): boolean {
    return this.#values.get(flag) === "true";
  }

  /** A whole number in [min, max]. */
  integer(flag: string, min: number, max: number): number {
    return this.#number(flag, this.text(flag), min, max, Number.isInteger);
  }

  optionalInteger(flag: string, min: number, max: number): number | null {
    const text = this.optionalText(flag);
    return text === null ? null : this.#number(flag, text, min, max, Number.isInteger);
  }

  number(flag: string, min: number, max: number): number {
    return this.#number(flag, this.text(flag), min, max, Number.isFinite);
  }

  /** One of the given words. */
  choice<Word extends string>(flag: string, words: readonly Word[]): Word {
    const text = this.text(flag);
    const word = words.find((candidate) => candidate === text);
    if (word === undefined) throw this.#wrong(flag, `one of ${words.join(", ")}`);
    return word;
  }

  /** Bytes from "512M", "1.5G", "2T", "4096B", "0"; powers of 1024. Only 0 goes without a unit. */
  optionalBytes(flag: string): number | null {
    const text = this.optionalText(flag);
    if (text === null) return null;
    const match = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$/i.exec(text);
    const hasUnit = match !== null && (/\D$/.test(text) || Number(text) === 0);
    if (!hasUnit) throw this.#wrong(flag, "a size with a unit, such as 512M or 4G");
    const power = "KMGT".indexOf(match[2]!.toUpperCase() || " ") + 1;
    const bytes = Math.floor(Number(match[1]) * 1024 ** power);
    if (bytes > Number.MAX_SAFE_INTEGER) throw this.#wrong(flag, "less than 8192T");
    return bytes;
  }

  #number(
    flag: string,
    text: string,
    min: number,
    max: number,
    isValid: (value: number) => boolean,
  ): number {
    const value = Number(text);
    if (text.trim() === "" || !isValid(value) || value < min || value > max) {
      throw this.#wrong(flag, `a number from ${min} to ${max}`);
    }
    return value;
  }

  #wrong(flag: string, wanted: string): OptionError {
    return new OptionError(`${this.source(flag)} must be ${wanted}, not "${this.text(flag)}"`);
  }
}

/** The options as aligned lines for --help. */
export function describeOptions(specs: readonly OptionSpec[]): string {
  const heads = specs.map(({ flag, value }) => `  --${flag}${value === null ? "" : ` ${value}`}`);
  const width = Math.max(...heads.map((head) => head.length)) + 2;
  return specs
    .map(({ help, fallback, env }, i) => {
      const notes = [
        fallback === null ? null : `default ${fallback}`,
        env === undefined ? null : `env ${env}`,
      ].filter((note) => note !== null);
      return `${heads[i]!.padEnd(width)}${help}${notes.length > 0 ? ` (${notes.join("; ")})` : ""}`;
    })
    .join("\n");
}

function parse(
  specs: readonly OptionSpec[],
  argv: readonly string[],
): Record<string, string | boolean | undefined> {
  const options = Object.fromEntries(
    specs.map(({ flag, value }) => [flag, { type: value === null ? "boolean" : "string" } as const]),
  );
  try {
    const args = withNegatives(specs, argv);
    return parseArgs({ args, options, strict: true, allowPositionals: false }).values as Record<
      string,
      string | boolean | undefined
    >;
  } catch (error) {
    throw new OptionError(`${(error as Error).message.split(/\.(?: To specify|\n)/)[0]}; --help lists the options`);
  }
}

/** "--threads -1" as "--threads=-1": the parser takes what begins with a dash for another option. */
function withNegatives(specs: readonly OptionSpec[], argv: readonly string[]): string[] {
  const withValue = new Set(specs.filter(({ value }) => value !== null).map(({ flag }) => `--${flag}`));
  const words: string[] = [];
  for (const word of argv) {
    const flag = words.at(-1);
    if (flag !== undefined && withValue.has(flag) && /^-\d/.test(word)) words[words.length - 1] = `${flag}=${word}`;
    else words.push(word);
  }
  return words;
}
