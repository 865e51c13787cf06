// The stand-in for an edge, for tests of the launcher.

import { runPart } from "./part.ts";

runPart("edge");
