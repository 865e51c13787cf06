// Same messages, other text: the template wrote an earlier turn anew.

import { describe, expect, test } from "bun:test";
import type { ChatMessage } from "../../sidecar/protocol.ts";
import { TemplateRewrites } from "../../sidecar/template-rewrites.ts";

const SALT = new Uint8Array(32);

function user(content: string): ChatMessage {
  return { role: "user", content };
}

function assistant(content: string): ChatMessage {
  return { role: "assistant", content };
}

describe("TemplateRewrites", () => {
  const first = [user("hello")];
  const next = [...first, assistant("hi"), user("and now?")];

  test("counts nothing while each turn begins with the text of the one before", () => {
    const rewrites = new TemplateRewrites(10);
    expect(rewrites.count(SALT, first, "U:hello A:", 0)).toBe(0);
    rewrites.note(SALT, first, "hi", "U:hello A:hi<end>", 9);
    expect(rewrites.count(SALT, next, "U:hello A:hi<end> U:and now? A:", 9)).toBe(0);
  });

  test("counts the tokens behind the point from which the text is another", () => {
    const rewrites = new TemplateRewrites(10);
    rewrites.note(SALT, first, "hi", "U:hello A:<think>hm</think>hi<end>", 20);
    expect(rewrites.count(SALT, next, "U:hello A:hi<end> U:and now? A:", 6)).toBe(14);
  });

  test("an edited message is the client's doing, and another account's conversation is another one", () => {
    const rewrites = new TemplateRewrites(10);
    rewrites.note(SALT, first, "hi", "U:hello A:hi<end>", 9);
    const edited = [user("hello!"), assistant("hi"), user("and now?")];
    expect(rewrites.count(SALT, edited, "U:hello! A:hi<end> U:and now? A:", 2)).toBe(0);
    expect(rewrites.count(new Uint8Array(32).fill(1), next, "something else", 0)).toBe(0);
  });

  test("the latest turn that is known counts, and the oldest is forgotten first", () => {
    const rewrites = new TemplateRewrites(2);
    rewrites.note(SALT, first, "hi", "one", 3);
    rewrites.note(SALT, next, "later", "two", 5);
    const third = [...next, assistant("later"), user("?")];
    expect(rewrites.count(SALT, third, "xxx", 1)).toBe(4);
    rewrites.note(SALT, [user("other")], "yes", "three", 1);
    expect(rewrites.count(SALT, next, "xxx", 0)).toBe(0);
    expect(rewrites.count(SALT, third, "xxx", 1)).toBe(4);
  });
});
