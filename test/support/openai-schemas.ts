// Answers checked against OpenAI's own API description: the response schemas of its openapi.yaml (MIT
// licence, beside this file), without their prose. Only the JSON Schema words that occur there are known.

import { readFileSync } from "node:fs";
import { gunzipSync } from "node:zlib";

type Schema = {
  $ref?: string;
  type?: string;
  nullable?: boolean;
  enum?: unknown[];
  anyOf?: Schema[];
  oneOf?: Schema[];
  items?: Schema;
  properties?: Record<string, Schema>;
  additionalProperties?: Schema;
  required?: string[];
};

const file = new URL("openai-schemas.json.gz", import.meta.url);
const { schemas } = JSON.parse(gunzipSync(readFileSync(file)).toString()) as {
  schemas: Record<string, Schema>;
};

/** What is wrong with `value` as the named schema has it; empty when nothing is. */
export function violations(name: string, value: unknown): string[] {
  const schema = schemas[name];
  if (schema === undefined) throw new Error(`no schema ${name}`);
  return check(schema, value, name);
}

function check(schema: Schema, value: unknown, path: string): string[] {
  if (value === null && schema.nullable === true) return [];
  if (schema.$ref !== undefined) return check(schemas[schema.$ref.split("/").at(-1)!]!, value, path);
  const variants = schema.anyOf ?? schema.oneOf;
  if (variants !== undefined) {
    const fits = variants.some((variant) => check(variant, value, path).length === 0);
    return fits ? [] : [`${path} fits none of its variants: ${JSON.stringify(value)}`];
  }
  if (schema.enum !== undefined && !schema.enum.includes(value)) {
    return [`${path} must be one of ${schema.enum.join(", ")}, not ${JSON.stringify(value)}`];
  }
  if (!hasType(schema.type, value)) return [`${path} must be ${schema.type}: ${JSON.stringify(value)}`];
  if (Array.isArray(value)) {
    return value.flatMap((item, i) => check(schema.items ?? {}, item, `${path}[${i}]`));
  }
  return typeof value === "object" && value !== null ? checkObject(schema, value, path) : [];
}

function checkObject(schema: Schema, value: object, path: string): string[] {
  const missing = (schema.required ?? []).filter((key) => !Object.hasOwn(value, key));
  const fields = Object.entries(value).flatMap(([key, field]) => {
    const own = schema.properties?.[key] ?? schema.additionalProperties;
    return own === undefined ? [] : check(own, field, `${path}.${key}`);
  });
  return [...missing.map((key) => `${path}.${key} is missing`), ...fields];
}

function hasType(type: string | undefined, value: unknown): boolean {
  if (type === undefined) return true;
  if (type === "null") return value === null;
  if (type === "array") return Array.isArray(value);
  if (type === "integer") return Number.isInteger(value);
  if (type === "object") return typeof value === "object" && value !== null && !Array.isArray(value);
  return typeof value === type;
}
