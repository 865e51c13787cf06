// The stand-in for an edge.

import { runPart } from "./part.ts";

runPart("edge");
