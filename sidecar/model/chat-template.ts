// Messages to prompt text by the model's own Jinja template, with the variables that the reference
// implementation gives it.

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { Template } from "@huggingface/jinja";
import { JsonFields } from "./json-fields.ts";
import { ModelError } from "./model-error.ts";

export interface TemplateMessage {
  readonly role: string;
  readonly content: string;
}

export interface RenderOptions {
  /** End with what opens the assistant's answer. */
  readonly addGenerationPrompt: boolean;
  /** Switches of this template, such as enable_thinking. */
  readonly variables?: Readonly<Record<string, unknown>>;
}

/** For models that bring no template (base models): roles as words, one paragraph a message. */
export const PLAIN_TEMPLATE =
  "{{ bos_token if bos_token }}" +
  "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n{% endfor %}" +
  "{% if add_generation_prompt %}Assistant:{% endif %}";

/** The template refused these messages, or failed on them; the message is the template's own where it gave
 * one. */
export class ChatTemplateError extends Error {
  override name = "ChatTemplateError";
}

export class ChatTemplate {
  readonly #template: Template;
  readonly #knowsDeveloper: boolean;

  /** variables: special tokens by name (bos_token, eos_token, ...). Throws when the source is not Jinja. */
  constructor(
    source: string,
    readonly variables: Readonly<Record<string, string>>,
    /** The model has none of its own. */
    readonly isPlain = false,
  ) {
    this.#template = new Template(source);
    this.#knowsDeveloper = source.includes("developer");
  }

  /**
   * A template that never names the role "developer" gets "system", which OpenAI's newer role stands for: templates
   * refuse what they do not know, or pass it on to a model that does not. Throws ChatTemplateError.
   */
  render(messages: readonly TemplateMessage[], options: RenderOptions): string {
    try {
      return this.#template.render({
        ...this.variables,
        // Null, not missing: templates ask "tools is not none".
        tools: null,
        documents: null,
        messages: this.#knowsDeveloper ? messages : messages.map(withoutDeveloper),
        add_generation_prompt: options.addGenerationPrompt,
        ...options.variables,
      });
    } catch (error) {
      throw new ChatTemplateError((error as Error).message);
    }
  }
}

function withoutDeveloper(message: TemplateMessage): TemplateMessage {
  return message.role === "developer" ? { ...message, role: "system" } : message;
}

/** chat_template.jinja, else chat_template.json, else tokenizer_config.json, else PLAIN_TEMPLATE. Throws
 * ModelError. */
export async function loadChatTemplate(directory: string): Promise<ChatTemplate> {
  const { file, source } = findTemplate(directory);
  const variables = readSpecialTokens(directory);
  if (source === null) return new ChatTemplate(PLAIN_TEMPLATE, variables, true);
  try {
    return new ChatTemplate(source, variables);
  } catch (error) {
    throw new ModelError(file, "chat_template", `is not a template: ${(error as Error).message}`);
  }
}

function findTemplate(directory: string): { file: string; source: string | null } {
  const jinjaFile = join(directory, "chat_template.jinja");
  if (existsSync(jinjaFile)) return { file: jinjaFile, source: readFileSync(jinjaFile, "utf8") };
  for (const name of ["chat_template.json", "tokenizer_config.json"]) {
    const file = join(directory, name);
    const source = readTemplateField(JsonFields.readOptional(file));
    if (source !== null) return { file, source };
  }
  return { file: jinjaFile, source: null };
}

/** The field holds one template, or a list of named ones of which "default" is for chat. */
function readTemplateField(fields: JsonFields | null): string | null {
  if (fields === null || !fields.has("chat_template")) return null;
  const value = fields.values["chat_template"];
  if (!Array.isArray(value)) return fields.text("chat_template");
  const named = value.map((entry, i) => fields.nested(`chat_template.${i}`, entry));
  const chosen = named.find((entry) => entry.text("name") === "default");
  return chosen === undefined
    ? fields.refuse("chat_template", 'has no template named "default"')
    : chosen.text("template");
}

/** All "..._token" fields, each a text or an object with the text as its content. */
function readSpecialTokens(directory: string): Record<string, string> {
  const tokens: Record<string, string> = {};
  for (const name of ["special_tokens_map.json", "tokenizer_config.json"]) {
    const fields = JsonFields.readOptional(join(directory, name));
    for (const [field, value] of Object.entries(fields?.values ?? {})) {
      if (!field.endsWith("_token")) continue;
      const text = typeof value === "string" ? value : (value as { content?: unknown } | null)?.content;
      if (typeof text === "string") tokens[field] = text;
    }
  }
  return tokens;
}
