// The launcher's options: those of the edge and of the sidecar in one list. What a person gives is passed on to
// the part it belongs to; what the launcher decides itself (addresses, secret, database) reaches them by
// environment, where `ps` does not show it.

import { join } from "node:path";
import { describeOptions, type OptionSpec, OptionValues } from "../config/options.ts";
import { EDGE_OPTIONS, type EdgeConfig, readEdgeConfig } from "../edge/config.ts";
import { readSidecarConfig, SIDECAR_OPTIONS, type SidecarConfig } from "../sidecar/config.ts";

type Environment = Readonly<Record<string, string | undefined>>;

/** Where a part's option means something else when all parts start together. */
const OVERRIDES: Readonly<Record<string, Partial<OptionSpec>>> = {
  sidecar: { fallback: null, help: "sidecars that run elsewhere; without it, one is started here" },
  "database-url": { help: "PostgreSQL to store conversations in; without it, one is started here" },
  data: { help: "where the database, caches and secrets live" },
  "log-level": { fallback: "warn" },
};
/** The sidecar listens for this machine's edge alone. */
const OWN_SIDECAR_ADDRESS: ReadonlySet<string> = new Set(["host", "port"]);
/** Options that the launcher answers by itself. */
const NOT_PASSED_ON: ReadonlySet<string> = new Set(["help", "sidecar", "database-url", "data"]);

export const LAUNCHER_OPTIONS: readonly OptionSpec[] = joinOptions();

export interface LauncherConfig {
  readonly edge: EdgeConfig;
  readonly sidecar: SidecarConfig;
  readonly edgeArguments: readonly string[];
  readonly sidecarArguments: readonly string[];
  /** Null: an embedded PostgreSQL. */
  readonly databaseUrl: string | null;
  /** Null: a sidecar of its own. */
  readonly sidecarUrls: string | null;
  /** Null: made at the first start, kept in the data directory. */
  readonly secret: string | null;
  readonly needsApiKey: boolean;
  readonly dataDirectory: string;
  readonly environment: Environment;
}

/** Throws OptionError. Null when --help was asked for. */
export function readLauncherConfig(argv: readonly string[], environment: Environment): LauncherConfig | null {
  const values = new OptionValues(LAUNCHER_OPTIONS, argv, environment);
  if (values.isSet("help")) return null;
  const given = givenArguments(argv);
  const databaseUrl = values.optionalText("database-url");
  const sidecarUrls = values.optionalText("sidecar");
  const secret = environment["KVASIR_SIDECAR_SECRET"] || null;
  // A level from the environment reaches the edge there.
  const level = values.source("log-level") === "--log-level" ? [`--log-level=${values.text("log-level")}`] : [];
  const edgeArguments = [...given(EDGE_OPTIONS), ...level];
  const sidecarArguments = given(SIDECAR_OPTIONS, OWN_SIDECAR_ADDRESS);
  // Read here as they will be there: what is wrong with an option is said before anything is started.
  const edge = readEdgeConfig(edgeArguments, {
    ...environment,
    DATABASE_URL: databaseUrl ?? "postgres://127.0.0.1",
    KVASIR_SIDECAR_SECRET: secret ?? "made later",
    KVASIR_SIDECARS: sidecarUrls ?? "ws://127.0.0.1",
  })!;
  const sidecar = readSidecarConfig([...sidecarArguments, `--data=${values.text("data")}`], environment)!;
  return Object.freeze({
    edge,
    sidecar,
    edgeArguments,
    sidecarArguments: [
      ...sidecarArguments,
      `--data=${sidecar.dataDirectory}`,
      "--host=127.0.0.1",
      "--port=0",
    ],
    databaseUrl,
    sidecarUrls,
    secret,
    needsApiKey: edge.apiKey !== null,
    dataDirectory: sidecar.dataDirectory,
    environment,
  });
}

export function launcherHelp(): string {
  return [
    "npm start -- [options]: runs PostgreSQL, a sidecar with a model, and the HTTP API, until Ctrl-C",
    "",
    describeOptions(LAUNCHER_OPTIONS),
    "",
    "Environment only: KVASIR_API_KEY (then clients must send it as a bearer token).",
  ].join("\n");
}

/** File with the secret that sidecar and edge share; the sidecar alone uses the same one. */
export function secretPath(dataDirectory: string): string {
  return join(dataDirectory, "sidecar-secret");
}

function joinOptions(): OptionSpec[] {
  const own = new Set([...EDGE_OPTIONS.map(({ flag }) => flag), ...OWN_SIDECAR_ADDRESS]);
  const ofSidecar = SIDECAR_OPTIONS.filter(({ flag }) => !own.has(flag));
  const isHelp = ({ flag }: OptionSpec) => flag === "help";
  const options = [...ofSidecar, ...EDGE_OPTIONS.filter((spec) => !isHelp(spec)), ...EDGE_OPTIONS.filter(isHelp)];
  return options.map((spec) => Object.assign({}, spec, OVERRIDES[spec.flag]));
}

/** The arguments as they were given, for the options of one part. */
function givenArguments(argv: readonly string[]) {
  const bare = LAUNCHER_OPTIONS.map(({ flag, value, help }) => ({ flag, value, help, fallback: null }));
  const values = new OptionValues(bare, argv, {});
  return (specs: readonly OptionSpec[], except: ReadonlySet<string> = new Set()): string[] =>
    specs
      .filter(({ flag }) => !NOT_PASSED_ON.has(flag) && !except.has(flag))
      .flatMap(({ flag, value }) => {
        const text = values.optionalText(flag);
        if (text === null) return [];
        return value === null ? [`--${flag}`] : [`--${flag}=${text}`];
      });
}
