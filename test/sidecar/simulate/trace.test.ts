// Reading traces, and the conversations that are made of them.

import { describe, expect, test } from "bun:test";
import { fileURLToPath } from "node:url";
import { Conversation } from "../../../sidecar/simulate/conversation.ts";
import { parseTrace, readTrace, TRACE_COLUMNS } from "../../../sidecar/simulate/trace.ts";

const TRACES = new URL("../../../sidecar/simulate/traces/", import.meta.url);

describe("a trace", () => {
  test("is a table of turns by session", () => {
    const text = `${TRACE_COLUMNS}\na\t1\t0\t-\t5\t6\nb\t1\t10\t-\t7\t8\na\t2\t20\t9\t3\t4\n`;
    expect(parseTrace(text, "t")).toEqual([
      [
        { arrivalMs: 0, keptTokens: null, newTokens: 5, outputTokens: 6 },
        { arrivalMs: 20, keptTokens: 9, newTokens: 3, outputTokens: 4 },
      ],
      [{ arrivalMs: 10, keptTokens: null, newTokens: 7, outputTokens: 8 }],
    ]);
  });

  test.each([
    ["other columns", "session turn", "t:1: expected the columns"],
    ["a missing field", `${TRACE_COLUMNS}\na\t1\t-\t-\t5`, "t:2: not a turn"],
    ["no number", `${TRACE_COLUMNS}\na\t1\t-\t-\tx\t5`, "t:2: not a turn"],
    ["a negative number", `${TRACE_COLUMNS}\na\t1\t-\t-\t-3\t5`, "t:2: not a turn"],
    ["a turn left out", `${TRACE_COLUMNS}\na\t1\t-\t-\t1\t5\na\t3\t-\t-\t1\t5`, "t:3: not a turn"],
    ["no lengths", `${TRACE_COLUMNS}\na\t1\t-\t-\t-\t5`, "t:2: not a turn"],
    ["no turns", TRACE_COLUMNS, "t: no turns"],
  ])("with %s is refused with its line", (_, text, message) => {
    expect(() => parseTrace(text, "t")).toThrow(message);
  });

  test("that is not there is refused with its path", () => {
    expect(() => readTrace("/nowhere/trace.tsv")).toThrow("cannot read the trace /nowhere/trace.tsv");
  });

  test("the bundled ones have the sessions that their README names", () => {
    const read = (name: string) => readTrace(fileURLToPath(new URL(name, TRACES)));
    const sharegpt = read("sharegpt.tsv.gz");
    expect([sharegpt.length, sharegpt.flat().length]).toEqual([5678, 30_731]);
    const mooncake = read("mooncake-conversation.tsv.gz");
    expect([mooncake.length, mooncake.flat().length]).toEqual([8056, 12_031]);
    expect(mooncake.flat().every(({ arrivalMs }) => arrivalMs !== null)).toBe(true);
  });
});

describe("a conversation", () => {
  const overflow = { contextTokens: 64, truncationRatio: 0.5, truncationKeepBlocks: 1 };

  test("fills its open last block before it takes another", () => {
    const conversation = new Conversation(8);
    expect(conversation.append(10)).toHaveLength(2);
    const grown = conversation.append(8);
    expect(grown.map((block) => [block.depth, block.tokenCount])).toEqual([
      [1, 8],
      [2, 2],
    ]);
    expect(conversation.tokenCount).toBe(18);
  });

  test("loses half a window after its kept first block when it overflows", () => {
    const conversation = new Conversation(8);
    conversation.append(60);
    expect(conversation.truncate(4, overflow)).toEqual([]);
    const dropped = conversation.truncate(5, overflow);
    expect(dropped.map((block) => block.depth)).toEqual([1, 2, 3, 4]);
    expect(conversation.blocks.map((block) => block.depth)).toEqual([0, 5, 6, 7]);
    expect(conversation.blocks[1]!.parent).toBe(conversation.blocks[0]!);
  });

  test("stops losing blocks when only the kept ones are left", () => {
    const conversation = new Conversation(8);
    conversation.append(60);
    conversation.truncate(64, overflow);
    expect(conversation.blocks.map((block) => block.depth)).toEqual([0]);
  });

  test("keeps the first tokens after an edit, cutting the block in which it falls", () => {
    const conversation = new Conversation(8);
    conversation.append(30);
    expect(conversation.keep(12).map((block) => block.depth)).toEqual([2, 3]);
    expect(conversation.blocks.map((block) => block.tokenCount)).toEqual([8, 4]);
    expect(conversation.keep(100)).toEqual([]);
    expect(conversation.keep(0)).toHaveLength(2);
  });
});
