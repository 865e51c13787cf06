// The stand-in for a sidecar, for tests of the launcher.

import { runPart } from "./part.ts";

runPart("sidecar");
