// The configuration table of the README, from the option lists themselves.

import { homedir } from "node:os";
import type { OptionSpec } from "../../config/options.ts";
import { EDGE_OPTIONS } from "../../edge/config.ts";
import { LAUNCHER_OPTIONS } from "../../launcher/config.ts";
import { SIDECAR_OPTIONS } from "../../sidecar/config.ts";

const PARTS = { edge: EDGE_OPTIONS, sidecar: SIDECAR_OPTIONS };

/** Markdown; one row per option of `npm start`, with the parts that have it and what is different there. */
export function optionsTable(): string {
  const rows = LAUNCHER_OPTIONS.map((spec) => {
    const { flag, value, help } = spec;
    const option = `\`--${flag}${value === null ? "" : ` ${value}`}\``;
    const parts = partsWith(flag).map(([part]) => part).join(", ");
    const cells = [option, cellOf(spec, defaultOf), cellOf(spec, variableOf), parts, help];
    return cells.map((cell) => cell.replaceAll("|", String.raw`\|`));
  });
  const head = ["option", "default", "environment", "of", "what"];
  return [head, head.map(() => "---"), ...rows].map((cells) => `| ${cells.join(" | ")} |`).join("\n");
}

function partsWith(flag: string): [part: string, spec: OptionSpec][] {
  return Object.entries(PARTS).flatMap(([part, specs]) => {
    const spec = specs.find((each) => each.flag === flag);
    return spec === undefined ? [] : [[part, spec]];
  });
}

/** What `npm start` has, then what a part that is run alone has instead. */
function cellOf(spec: OptionSpec, read: (spec: OptionSpec) => string): string {
  const together = read(spec);
  const alone = partsWith(spec.flag)
    .filter(([, own]) => read(own) !== together)
    .map(([part, own]) => `${part} alone: ${read(own) || "none"}`);
  return [together, ...alone].filter((text) => text !== "").join("; ");
}

function defaultOf({ fallback }: OptionSpec): string {
  return fallback === null ? "" : `\`${fallback.replace(homedir(), "~")}\``;
}

function variableOf({ env }: OptionSpec): string {
  return env === undefined ? "" : `\`${env}\``;
}
