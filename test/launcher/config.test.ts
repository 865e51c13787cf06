// The launcher's options are those of its parts, and reach the part they belong to.

import { describe, expect, test } from "bun:test";
import { LAUNCHER_OPTIONS, launcherHelp, readLauncherConfig } from "../../launcher/config.ts";
import { EDGE_OPTIONS } from "../../edge/config.ts";
import { SIDECAR_OPTIONS } from "../../sidecar/config.ts";

describe("readLauncherConfig", () => {
  test("has every option of both parts once, and explains it", () => {
    const flags = LAUNCHER_OPTIONS.map(({ flag }) => flag);
    expect(new Set(flags).size).toBe(flags.length);
    expect(flags.toSorted()).toEqual(
      [...new Set([...EDGE_OPTIONS, ...SIDECAR_OPTIONS].map(({ flag }) => flag))].toSorted(),
    );
    for (const flag of flags) expect(launcherHelp()).toContain(`--${flag}`);
    expect(readLauncherConfig(["--help"], {})).toBeNull();
  });

  test("passes on what was given, to the part it belongs to", () => {
    const argv = ["--port", "9000", "--max-num-seqs", "4", "--drain-timeout", "5", "--random-weights", "--data", "/d"];
    const config = readLauncherConfig(argv, {})!;
    expect(config.edgeArguments).toEqual(["--port=9000", "--drain-timeout=5", "--log-level=warn"]);
    expect(config.sidecarArguments).toEqual([
      "--random-weights", "--max-num-seqs=4", "--drain-timeout=5", "--data=/d", "--host=127.0.0.1", "--port=0",
    ]);
    expect(config).toMatchObject({ dataDirectory: "/d", databaseUrl: null, sidecarUrls: null, secret: null });
  });

  test("has its own level for the edge's log, unless one is given", () => {
    const levels = (argv: string[], env: Record<string, string>) => {
      const { edge, edgeArguments } = readLauncherConfig(argv, env)!;
      return [edge.logLevel, edgeArguments];
    };
    expect(levels([], {})).toEqual(["warn", ["--log-level=warn"]]);
    expect(levels([], { KVASIR_LOG_LEVEL: "debug" })).toEqual(["debug", []]);
    expect(levels(["--log-level=error"], { KVASIR_LOG_LEVEL: "debug" })[0]).toBe("error");
  });

  test("takes sidecars and a database that run elsewhere, and the secret from the environment", () => {
    const env = { DATABASE_URL: "postgres://db/x", KVASIR_SIDECAR_SECRET: "s", KVASIR_API_KEY: "k" };
    const config = readLauncherConfig(["--sidecar", "ws://a:1"], env)!;
    expect(config).toMatchObject({
      databaseUrl: "postgres://db/x", sidecarUrls: "ws://a:1", secret: "s", needsApiKey: true,
    });
  });

  test("says before anything is started what is wrong", () => {
    const cases: [string[], Record<string, string>, string][] = [
      [["--port", "x"], {}, "--port must be a number"],
      [["--block-tokens", "12"], {}, '--block-tokens must be one of 8, 16, 32, 64, 128, 256, not "12"'],
      [["--block-tokens", "7"], {}, '--block-tokens must be one of 8, 16, 32, 64, 128, 256, not "7"'],
      [[], { KVASIR_PORT: "x" }, "KVASIR_PORT must be a number"],
      [[], { KVASIR_LOG_LEVEL: "loud" }, "KVASIR_LOG_LEVEL must be one of debug,"],
      [[], { KVASIR_BACKEND: "tpu" }, "KVASIR_BACKEND must be one of auto, cpu, cuda"],
      [["--sidecar", "http://a"], {}, "--sidecar or KVASIR_SIDECARS must be ws://"],
      [[], { DATABASE_URL: "mysql://a" }, "DATABASE_URL must be postgres://"],
      [["--nope"], {}, "--help lists the options"],
    ];
    for (const [argv, env, message] of cases) expect(() => readLauncherConfig(argv, env)).toThrow(message);
  });
});
