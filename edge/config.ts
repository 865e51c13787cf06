// The edge's configuration: one frozen object, read once from flags and environment.

import { describeOptions, OptionError, type OptionSpec, OptionValues } from "../config/options.ts";

export const EDGE_OPTIONS: readonly OptionSpec[] = [
  { flag: "host", value: "ADDRESS", fallback: "127.0.0.1", help: "address to listen on" },
  { flag: "port", value: "N", fallback: "8787", env: "KVASIR_PORT", help: "port of the API; 0: any free one" },
  { flag: "sidecar", value: "URL[,URL...]", fallback: "ws://127.0.0.1:8786", env: "KVASIR_SIDECARS", help: "sidecars to use; their secret comes in KVASIR_SIDECAR_SECRET" },
  { flag: "database-url", value: "URL", fallback: null, env: "DATABASE_URL", help: "PostgreSQL to store conversations in" },
  { flag: "allowed-hosts", value: "NAME[,NAME...]", fallback: null, env: "KVASIR_ALLOWED_HOSTS", help: "names clients may call the edge by, beside localhost and --host; *: any" },
  { flag: "body-limit-bytes", value: "N", fallback: "8388608", help: "longest request body; longer ones are refused with 413" },
  { flag: "request-timeout-ms", value: "N", fallback: "600000", help: "longest time for one answer; then it ends with 504" },
  { flag: "max-in-flight", value: "N", fallback: "1024", help: "answers in progress at once; more are refused with 429" },
  { flag: "keep-alive-ms", value: "N", fallback: "15000", help: "pause after which a silent stream gets a comment, so that proxies keep it" },
  { flag: "database-pool", value: "N", fallback: "10", help: "database connections" },
  { flag: "database-timeout-ms", value: "N", fallback: "5000", help: "longest wait for one query" },
  { flag: "commit-timeout-ms", value: "N", fallback: "5000", help: "longest wait for a turn to be stored; then the answer ends with turn_not_stored" },
  { flag: "lease-ms", value: "N", fallback: "60000", help: "after an edge dies, its conversations are busy for so long" },
  { flag: "drain-timeout", value: "SECONDS", fallback: "30", help: "how long a stop waits for answers in progress" },
  { flag: "log-level", value: "LEVEL", fallback: "info", env: "KVASIR_LOG_LEVEL", help: "debug, info, warn, error or silent" },
  { flag: "help", value: null, fallback: null, help: "print this" },
];

const LOG_LEVELS = ["debug", "info", "warn", "error", "silent"] as const;

/** Limits that no flag sets: they belong to the API, not to a deployment. */
export const LIMITS = Object.freeze({
  /** Nesting of a request body's arrays and objects. */
  jsonDepth: 32,
  /** From a request's head to the last byte of its body. */
  bodyTimeoutMs: 60_000,
  /** Messages of one request. */
  messages: 10_000,
  /** Conversations on one page of a list. */
  listPage: 100,
  /** Sidecars one request is offered to before it fails. */
  placementTries: 3,
  /** Wait for some sidecar to be connected before a request is refused with 503. */
  sidecarWaitMs: 5000,
  /** Pending deletes sent to a sidecar in one go. */
  deleteBatch: 1000,
});

export interface EdgeConfig {
  readonly host: string;
  readonly port: number;
  readonly sidecarUrls: readonly string[];
  readonly sidecarSecret: string;
  readonly databaseUrl: string;
  /** Lower case names without port; null: any name. */
  readonly allowedHosts: ReadonlySet<string> | null;
  /** Wanted from clients as a bearer token; null: everyone who reaches the port may use it. */
  readonly apiKey: string | null;
  readonly bodyLimitBytes: number;
  readonly requestTimeoutMs: number;
  readonly maxInFlight: number;
  readonly keepAliveMs: number;
  readonly databasePool: number;
  readonly databaseTimeoutMs: number;
  readonly commitTimeoutMs: number;
  readonly leaseMs: number;
  readonly drainTimeoutMs: number;
  readonly logLevel: (typeof LOG_LEVELS)[number];
}

/** Throws OptionError. Null when --help was asked for. */
export function readEdgeConfig(
  argv: readonly string[],
  env: Readonly<Record<string, string | undefined>>,
): EdgeConfig | null {
  const values = new OptionValues(EDGE_OPTIONS, argv, env);
  if (values.isSet("help")) return null;
  const host = values.text("host");
  const sidecarSecret = env["KVASIR_SIDECAR_SECRET"] ?? "";
  if (sidecarSecret === "") {
    throw new OptionError("KVASIR_SIDECAR_SECRET is not set: it must hold the sidecars' secret");
  }
  const databaseUrl = values.optionalText("database-url");
  if (databaseUrl === null) {
    throw new OptionError("--database-url or DATABASE_URL must name the PostgreSQL for conversations");
  }
  if (!/^postgres(ql)?:\/\//.test(databaseUrl)) {
    throw new OptionError("--database-url or DATABASE_URL must be postgres://USER:PASSWORD@HOST:PORT/DATABASE");
  }
  return Object.freeze({
    host,
    port: values.integer("port", 0, 65535),
    sidecarUrls: values.text("sidecar").split(",").map(parseSidecarUrl),
    sidecarSecret,
    databaseUrl,
    allowedHosts: parseAllowedHosts(values.optionalText("allowed-hosts"), host),
    apiKey: env["KVASIR_API_KEY"] || null,
    bodyLimitBytes: values.integer("body-limit-bytes", 1024, 32 * 1024 * 1024),
    requestTimeoutMs: values.integer("request-timeout-ms", 1, 86_400_000),
    maxInFlight: values.integer("max-in-flight", 1, 1_000_000),
    keepAliveMs: values.integer("keep-alive-ms", 10, 3_600_000),
    databasePool: values.integer("database-pool", 1, 1000),
    databaseTimeoutMs: values.integer("database-timeout-ms", 10, 600_000),
    commitTimeoutMs: values.integer("commit-timeout-ms", 10, 600_000),
    leaseMs: values.integer("lease-ms", 1000, 3_600_000),
    drainTimeoutMs: values.number("drain-timeout", 0, 3600) * 1000,
    logLevel: values.choice("log-level", LOG_LEVELS),
  });
}

/** The configuration as it may be logged: without secrets. */
export function publicConfig(config: EdgeConfig): Record<string, unknown> {
  const { apiKey, databaseUrl: _url, sidecarSecret: _secret, allowedHosts, ...rest } = config;
  return { ...rest, allowedHosts: [...(allowedHosts ?? ["*"])], hasApiKey: apiKey !== null };
}

/** True when only this machine reaches the port. */
export function isLoopback(host: string): boolean {
  return host === "localhost" || host === "::1" || host.startsWith("127.");
}

export function edgeHelp(): string {
  return [
    "bun run edge, or deno task edge: the HTTP API in front of the sidecars",
    "",
    describeOptions(EDGE_OPTIONS),
    "",
    "Environment only: KVASIR_SIDECAR_SECRET (wanted), KVASIR_API_KEY (then clients must send it).",
  ].join("\n");
}

function parseSidecarUrl(text: string): string {
  const url = URL.parse(text.trim());
  if (url === null || !["ws:", "wss:"].includes(url.protocol)) {
    throw new OptionError(`--sidecar or KVASIR_SIDECARS must be ws:// or wss:// URLs, not "${text}"`);
  }
  return url.href;
}

function parseAllowedHosts(text: string | null, host: string): ReadonlySet<string> | null {
  const names = (text ?? "").split(",").map((name) => name.trim().toLowerCase());
  if (names.includes("*")) return null;
  const own = host.includes(":") ? `[${host}]` : host;
  return new Set(["localhost", "127.0.0.1", "[::1]", own, ...names.filter((name) => name !== "")]);
}
