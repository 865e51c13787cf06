// Flags and environment of the edge: defaults, limits, and secrets that are never shown.

import { describe, expect, test } from "bun:test";
import { EDGE_OPTIONS, edgeHelp, publicConfig, readEdgeConfig } from "../../edge/config.ts";

const env = { KVASIR_SIDECAR_SECRET: "s", DATABASE_URL: "postgres://db/kvasir" };

describe("readEdgeConfig", () => {
  test("has a default for every limit, and is frozen", () => {
    const config = readEdgeConfig([], env)!;
    expect(config).toMatchObject({ host: "127.0.0.1", port: 8787, commitTimeoutMs: 5000 });
    expect(config.sidecarUrls).toEqual(["ws://127.0.0.1:8786/"]);
    expect([...config.allowedHosts!]).toEqual(["localhost", "127.0.0.1", "[::1]"]);
    expect(Object.isFrozen(config)).toBe(true);
  });

  test("takes flags before environment", () => {
    const more = { ...env, KVASIR_PORT: "1", KVASIR_SIDECARS: "ws://a:1,wss://b:2" };
    const config = readEdgeConfig(["--port", "2", "--allowed-hosts", "Chat.example"], more)!;
    expect(config.port).toBe(2);
    expect(config.sidecarUrls).toEqual(["ws://a:1/", "wss://b:2/"]);
    expect(config.allowedHosts!.has("chat.example")).toBe(true);
    expect(readEdgeConfig(["--allowed-hosts", "*"], env)!.allowedHosts).toBeNull();
  });

  test("says what is missing or wrong", () => {
    const cases: [string[], object, string][] = [
      [[], { DATABASE_URL: "x" }, "KVASIR_SIDECAR_SECRET is not set"],
      [[], { KVASIR_SIDECAR_SECRET: "s" }, "--database-url or DATABASE_URL must name the PostgreSQL"],
      [["--database-url", "foo"], env, "--database-url or DATABASE_URL must be postgres://"],
      [["--port", "70000"], env, "--port must be a number from 0 to 65535"],
      [["--sidecar", "http://x"], env, "--sidecar or KVASIR_SIDECARS must be ws:// or wss:// URLs"],
      [["--prot", "1"], env, "--help lists the options"],
    ];
    for (const [argv, vars, message] of cases) {
      expect(() => readEdgeConfig(argv, vars as Record<string, string>)).toThrow(message);
    }
  });

  test("is logged without its secrets", () => {
    const secrets = { KVASIR_SIDECAR_SECRET: "hush1", DATABASE_URL: "postgres://u:hush2@h/d" };
    const config = readEdgeConfig([], { ...secrets, KVASIR_API_KEY: "hush3" })!;
    const logged = JSON.stringify(publicConfig(config));
    expect(logged).toContain('"hasApiKey":true');
    expect(logged).not.toContain("hush");
  });

  test("explains every option", () => {
    for (const { flag } of EDGE_OPTIONS) expect(edgeHelp()).toContain(`--${flag}`);
    expect(readEdgeConfig(["--help"], {})).toBeNull();
  });
});
