// Runs before every test file (bunfig.toml names it): tests that start processes and databases need more than the five
// seconds that Bun gives them, most of all while other tests keep the machine busy.

import { setDefaultTimeout } from "bun:test";

setDefaultTimeout(60_000);
