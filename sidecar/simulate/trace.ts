// A trace: who says how much, and when if that is known. The text form is a table of one line per turn,
// tab-separated, with the columns of TRACE_COLUMNS; "-" stands for what a trace does not know. Files may be
// gzipped.

import { readFileSync } from "node:fs";

export const TRACE_COLUMNS = "session\tturn\tarrival_ms\tkept_tokens\tnew_tokens\toutput_tokens";

export interface Turn {
  /** Since the start of the trace; null: the turn comes a think time after the answer before it. */
  readonly arrivalMs: number | null;
  /** Tokens of the conversation so far that this turn keeps (less after an edit); null: all. */
  readonly keptTokens: number | null;
  /** The user's message. */
  readonly newTokens: number;
  /** The answer. */
  readonly outputTokens: number;
}

export type Session = readonly Turn[];

/** A trace that cannot be read; the message names the line. */
export class TraceError extends Error {
  override name = "TraceError";
}

export function readTrace(path: string): Session[] {
  return parseTrace(decode(readBytes(path)), path);
}

/** Throws TraceError. */
export function parseTrace(text: string, name: string): Session[] {
  const sessions = new Map<string, Turn[]>();
  const [header, ...lines] = text.trimEnd().split("\n");
  if (header !== TRACE_COLUMNS) {
    throw new TraceError(`${name}:1: expected the columns ${TRACE_COLUMNS.replaceAll("\t", " ")}`);
  }
  lines.forEach((line, i) => {
    const fields = line.split("\t");
    const turns = sessions.get(fields[0]!) ?? [];
    const turn = parseTurn(fields);
    if (turn === null || Number(fields[1]) !== turns.length + 1) {
      throw new TraceError(`${name}:${i + 2}: not a turn that follows: ${line}`);
    }
    turns.push(turn);
    sessions.set(fields[0]!, turns);
  });
  if (sessions.size === 0) throw new TraceError(`${name}: no turns`);
  return [...sessions.values()];
}

function parseTurn(fields: readonly string[]): Turn | null {
  if (fields.length !== 6) return null;
  const [arrivalMs, keptTokens, newTokens, outputTokens] = fields.slice(2).map((field) => {
    if (field === "-") return null;
    return /^\d+$/.test(field) ? Number(field) : Number.NaN;
  });
  const isKnown = typeof newTokens === "number" && typeof outputTokens === "number";
  if (!isKnown || [arrivalMs, keptTokens, newTokens, outputTokens].some(Number.isNaN)) return null;
  return { arrivalMs: arrivalMs!, keptTokens: keptTokens!, newTokens, outputTokens };
}

function readBytes(path: string): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(readFileSync(path));
  } catch (error) {
    throw new TraceError(`cannot read the trace ${path}: ${(error as Error).message}`);
  }
}

function decode(bytes: Uint8Array<ArrayBuffer>): string {
  const isGzip = bytes[0] === 0x1f && bytes[1] === 0x8b;
  return new TextDecoder().decode(isGzip ? Bun.gunzipSync(bytes) : bytes);
}
