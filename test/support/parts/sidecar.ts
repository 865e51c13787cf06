// The stand-in for a sidecar.

import { runPart } from "./part.ts";

runPart("sidecar");
