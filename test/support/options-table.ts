// The configuration table of the README, from the option lists themselves.

import { homedir } from "node:os";
import { EDGE_OPTIONS } from "../../edge/config.ts";
import { LAUNCHER_OPTIONS } from "../../launcher/config.ts";
import { SIDECAR_OPTIONS } from "../../sidecar/config.ts";

/** Markdown; one row per option of `npm start`, with the part that it belongs to. */
export function optionsTable(): string {
  const rows = LAUNCHER_OPTIONS.map(({ flag, value, fallback, env, help }) => {
    const option = `\`--${flag}${value === null ? "" : ` ${value}`}\``;
    const standsFor = fallback === null ? "" : `\`${fallback.replace(homedir(), "~")}\``;
    const variable = env === undefined ? "" : `\`${env}\``;
    return [option, standsFor, variable, partsOf(flag), help].map((cell) => cell.replaceAll("|", String.raw`\|`));
  });
  const head = ["option", "default", "environment", "of", "what"];
  return [head, head.map(() => "---"), ...rows].map((cells) => `| ${cells.join(" | ")} |`).join("\n");
}

function partsOf(flag: string): string {
  const parts = { edge: EDGE_OPTIONS, sidecar: SIDECAR_OPTIONS };
  return Object.entries(parts)
    .flatMap(([part, options]) => (options.some((option) => option.flag === flag) ? [part] : []))
    .join(", ");
}
