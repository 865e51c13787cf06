// Chat templates of real models render as their reference does, and broken ones say what is wrong.

import { afterAll, beforeAll, describe, expect, setSystemTime, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import {
  ChatTemplate,
  ChatTemplateError,
  loadChatTemplate,
  type TemplateMessage,
} from "../../../sidecar/model/chat-template.ts";
import { ModelError } from "../../../sidecar/model/model-error.ts";

interface TemplateCase {
  readonly chat_template: string;
  readonly data: { messages: TemplateMessage[] } & Record<string, unknown>;
  readonly target: string;
}

const GOLDEN = new URL("../../golden/hf-chat-templates.json.gz", import.meta.url);
const { default_templates, custom_templates } = JSON.parse(
  gunzipSync(readFileSync(GOLDEN)).toString(),
) as Record<"default_templates" | "custom_templates", Record<string, TemplateCase>>;
const CASES = { ...default_templates, ...custom_templates };

function render({ chat_template, data }: TemplateCase): string {
  // Some cases leave add_generation_prompt undefined, and a template may ask for that.
  const variables = { add_generation_prompt: undefined, ...data };
  return new ChatTemplate(chat_template, {}).render(data.messages, { addGenerationPrompt: false, variables });
}

function withDirectory(
  files: Record<string, string>,
  body: (directory: string) => Promise<void>,
): Promise<void> {
  const directory = mkdtempSync(join(tmpdir(), "kvasir-template-"));
  for (const [name, content] of Object.entries(files)) writeFileSync(join(directory, name), content);
  return body(directory).finally(() => rmSync(directory, { recursive: true }));
}

const HELLO = [{ role: "user", content: "Hello!" }];

describe("templates of real models", () => {
  // One of them prints the date of its making.
  beforeAll(() => void setSystemTime(new Date("2025-07-10T12:00:00Z")));
  afterAll(() => void setSystemTime());

  test("are all here", () => {
    expect(Object.keys(CASES)).toHaveLength(53);
  });

  for (const [name, templateCase] of Object.entries(CASES)) {
    test(`${name} renders as the reference implementation does`, () => {
      expect(render(templateCase)).toBe(templateCase.target);
    });
  }

  test("get the role developer where they know it, else system", () => {
    const roles = "{% for message in messages %}{{ message.role }} {% endfor %}";
    const messages = [{ role: "developer", content: "Be brief." }, ...HELLO];
    const rendered = (source: string) => new ChatTemplate(source, {}).render(messages, { addGenerationPrompt: false });
    expect(rendered(roles)).toBe("system user ");
    expect(rendered(`${roles}{% if messages[0].role == 'developer' %}!{% endif %}`)).toBe("developer user !");
  });

  test("see no tools where a request has none", () => {
    const { chat_template } = CASES["meta-llama/Llama-3.1-8B-Instruct"]!;
    const template = new ChatTemplate(chat_template, { bos_token: "<s>" });
    const text = template.render(HELLO, { addGenerationPrompt: true });
    expect(text).toContain("Hello!");
    expect(text).not.toContain("function");
  });
});

describe("a model directory's template", () => {
  test("is found in tokenizer_config.json, with its special tokens, as text or object", () =>
    withDirectory(
      {
        "tokenizer_config.json": JSON.stringify({
          chat_template: "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
          bos_token: { content: "<s>" },
          eos_token: "</s>",
        }),
      },
      async (directory) => {
        const template = await loadChatTemplate(directory);
        expect(template.render(HELLO, { addGenerationPrompt: true })).toBe("<s>Hello!</s>");
      },
    ));

  test("is the one named default where there are several", () =>
    withDirectory(
      {
        "tokenizer_config.json": JSON.stringify({
          chat_template: [
            { name: "tool_use", template: "tools" },
            { name: "default", template: "chat" },
          ],
        }),
      },
      async (directory) => {
        const template = await loadChatTemplate(directory);
        expect(template.render(HELLO, { addGenerationPrompt: true })).toBe("chat");
      },
    ));

  test("is chat_template.jinja before all others", () =>
    withDirectory(
      {
        "chat_template.jinja": "jinja",
        "chat_template.json": JSON.stringify({ chat_template: "json" }),
        "tokenizer_config.json": JSON.stringify({ chat_template: "config" }),
      },
      async (directory) => {
        const template = await loadChatTemplate(directory);
        expect(template.render(HELLO, { addGenerationPrompt: true })).toBe("jinja");
      },
    ));

  test("is a plain one for a model that brings none", () =>
    withDirectory({ "tokenizer_config.json": JSON.stringify({ bos_token: "<s>" }) }, async (directory) => {
      const template = await loadChatTemplate(directory);
      expect(template.isPlain).toBe(true);
      expect(template.render(HELLO, { addGenerationPrompt: true })).toBe("<s>User: Hello!\n\nAssistant:");
    }));

  test("that does not parse is an error that names the file", () =>
    withDirectory({ "chat_template.jinja": "{% for %}" }, async (directory) => {
      const error = await loadChatTemplate(directory).catch((reason: unknown) => reason);
      expect(error).toBeInstanceOf(ModelError);
      expect((error as Error).message).toContain("chat_template.jinja: chat_template: is not a template");
    }));

  test("may refuse messages, in its own words", async () => {
    const template = await loadChatTemplate("sidecar/models/kvasir-15m-chat");
    const refused = [{ role: "tool", content: "x" }];
    expect(() => template.render(refused, { addGenerationPrompt: true })).toThrow(
      new ChatTemplateError("Unknown role: tool"),
    );
  });
});
