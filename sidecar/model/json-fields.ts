// Reads a JSON file of a model directory field by field: each getter checks the type, and each complaint
// names the file and the field.

import { existsSync, readFileSync } from "node:fs";
import { ModelError } from "./model-error.ts";

export type JsonObject = Readonly<Record<string, unknown>>;

export class JsonFields {
  constructor(
    readonly file: string,
    readonly values: JsonObject,
    /** Put before field names in complaints, e.g. "rope_scaling.". */
    readonly prefix = "",
  ) {}

  /** Throws ModelError when the file is missing, is not JSON or holds no object. */
  static read(file: string): JsonFields {
    return new JsonFields(file, readJsonObject(file));
  }

  /** Null when there is no such file. */
  static readOptional(file: string): JsonFields | null {
    return existsSync(file) ? JsonFields.read(file) : null;
  }

  /** Null and missing are the same, as they are to the reference implementation. */
  has(field: string): boolean {
    return this.values[field] !== undefined && this.values[field] !== null;
  }

  /** A whole number >= min. */
  count(field: string, fallback?: number, min = 1): number {
    const value = this.#number(field, fallback);
    if (!Number.isSafeInteger(value) || value < min) {
      this.refuse(field, `must be a whole number of at least ${min}, not ${value}`);
    }
    return value;
  }

  /** A number > 0. */
  positive(field: string, fallback?: number): number {
    const value = this.#number(field, fallback);
    if (!(value > 0) || !Number.isFinite(value)) {
      this.refuse(field, `must be a positive number, not ${value}`);
    }
    return value;
  }

  flag(field: string, fallback: boolean): boolean {
    const value = this.values[field] ?? fallback;
    if (typeof value !== "boolean") this.refuse(field, `must be true or false, not ${show(value)}`);
    return value;
  }

  text(field: string, fallback?: string): string {
    const value = this.values[field] ?? fallback;
    if (value === undefined) this.refuse(field, "is missing");
    if (typeof value !== "string") this.refuse(field, `must be text, not ${show(value)}`);
    return value;
  }

  /** Null when the field is missing. */
  texts(field: string): readonly string[] | null {
    const value = this.values[field];
    if (value === undefined || value === null) return null;
    if (!Array.isArray(value) || !value.every((item) => typeof item === "string")) {
      this.refuse(field, `must be a list of texts, not ${show(value)}`);
    }
    return value as string[];
  }

  /** Null when the field is missing. */
  fields(field: string): JsonFields | null {
    return this.has(field) ? this.nested(field, this.values[field]) : null;
  }

  /** `value`, found under `field` (or a path below it), as fields of its own. */
  nested(field: string, value: unknown): JsonFields {
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      this.refuse(field, `must be an object, not ${show(value)}`);
    }
    return new JsonFields(this.file, value as JsonObject, `${this.prefix}${field}.`);
  }

  /** Throws ModelError about a field. */
  refuse(field: string, reason: string): never {
    throw new ModelError(this.file, this.prefix + field, reason);
  }

  #number(field: string, fallback: number | undefined): number {
    const value = this.values[field] ?? fallback;
    if (value === undefined) this.refuse(field, "is missing");
    if (typeof value !== "number") this.refuse(field, `must be a number, not ${show(value)}`);
    return value;
  }
}

/** Throws ModelError when the file is missing, is not JSON or holds no object. */
export function readJsonObject(file: string): JsonObject {
  let text: string;
  try {
    text = readFileSync(file, "utf8");
  } catch (error) {
    throw new ModelError(file, "", `cannot be read (${(error as NodeJS.ErrnoException).code})`);
  }
  return parseJsonObject(file, text);
}

export function parseJsonObject(file: string, text: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new ModelError(file, "", `is not JSON: ${(error as Error).message}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new ModelError(file, "", "must hold a JSON object");
  }
  return value as JsonObject;
}

function show(value: unknown): string {
  return JSON.stringify(value)?.slice(0, 60) ?? "nothing";
}
