// The shapes of real models, for made-up weights: speed depends on nothing else. They stand in a file that the scripts
// of the Python stack read, too; tiny is there to try the bench itself without a GPU.

import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import shapes from "../shapes.json";

/** config.json by short name. */
const SHAPES: Readonly<Record<string, Readonly<Record<string, unknown>>>> = shapes;

/** A model directory with nothing but a config. */
export function modelDirectory(shape: string): string {
  const config = SHAPES[shape];
  if (config === undefined) throw new Error(`no shape ${shape}: ${Object.keys(SHAPES).join(", ")}`);
  const directory = mkdtempSync(join(tmpdir(), `kvasir-${shape}-`));
  writeFileSync(join(directory, "config.json"), JSON.stringify(config));
  return directory;
}
