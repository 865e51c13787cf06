// The command line of a bench: its options are texts, --help prints its opening comment, which lists them, and what it
// does not know is refused with the same.

import { readFileSync } from "node:fs";
import { parseArgs, type ParseArgsOptionsConfig } from "node:util";

type Values<Options extends ParseArgsOptionsConfig> = ReturnType<typeof parseArgs<{ options: Options }>>["values"];

/** `path`: the bench's file. What comes behind "--" is left to it. Ends the process on --help and on what is wrong. */
export function benchOptions<Options extends ParseArgsOptionsConfig>(path: string, options: Options): Values<Options> {
  const split = process.argv.indexOf("--");
  const args = process.argv.slice(2, split < 0 ? undefined : split);
  if (args.includes("--help")) {
    console.log(openingComment(path));
    process.exit(0);
  }
  try {
    return parseArgs({ args, options }).values as Values<Options>;
  } catch (error) {
    console.error(`${(error as Error).message}\n\n${openingComment(path)}`);
    process.exit(1);
  }
}

function openingComment(path: string): string {
  const lines = readFileSync(path, "utf8").split("\n");
  const end = lines.findIndex((line) => !line.startsWith("//"));
  return lines.slice(0, end).map((line) => line.slice(3)).join("\n");
}
