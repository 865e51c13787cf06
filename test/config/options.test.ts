// Options as data: where values come from, what is refused, and that the help says everything.

import { describe, expect, test } from "bun:test";
import { describeOptions, OptionError, type OptionSpec, OptionValues } from "../../config/options.ts";

const SPECS: readonly OptionSpec[] = [
  { flag: "port", value: "N", fallback: "80", env: "TEST_PORT", help: "where to listen" },
  { flag: "size", value: "SIZE", fallback: null, help: "how much" },
  { flag: "mode", value: "a|b", fallback: "a", help: "which" },
  { flag: "fast", value: null, fallback: null, help: "hurry" },
];

const read = (argv: string[], env: Record<string, string> = {}) => new OptionValues(SPECS, argv, env);

describe("OptionValues", () => {
  test("takes the flag, then the environment, then the default", () => {
    expect(read([]).integer("port", 0, 100)).toBe(80);
    expect(read([], { TEST_PORT: "81" }).integer("port", 0, 100)).toBe(81);
    expect(read(["--port", "82"], { TEST_PORT: "81" }).integer("port", 0, 100)).toBe(82);
    expect(read([], { TEST_PORT: "" }).integer("port", 0, 100)).toBe(80);
    expect(read(["--fast"]).isSet("fast")).toBe(true);
    expect(read([]).isSet("fast")).toBe(false);
  });

  test("reads sizes", () => {
    const bytes = (text: string) => read(["--size", text]).optionalBytes("size");
    expect(read([]).optionalBytes("size")).toBeNull();
    expect(["0", "4096B", "512M", "1.5G", "2T", "1KiB", "3 mb"].map(bytes)).toEqual([
      0, 4096, 512 * 2 ** 20, 1.5 * 2 ** 30, 2 * 2 ** 40, 1024, 3 * 2 ** 20,
    ]);
    for (const text of ["-1", "G", "1X", "1,5G", "0x10"]) expect(() => bytes(`${text}`)).toThrow(OptionError);
    // Somebody who means gigabytes would get a tier of no block.
    for (const text of ["1", "4096", "1.5"]) {
      expect(() => bytes(text)).toThrow(`--size must be a size with a unit, such as 512M or 4G, not "${text}"`);
    }
    expect(bytes("8191T")).toBe(8191 * 2 ** 40);
    for (const text of ["8192T", `${"9".repeat(400)}B`]) {
      expect(() => bytes(text)).toThrow("--size must be less than 8192T");
    }
  });

  test("names the variable that a wrong value came from", () => {
    const port = (argv: string[]) => read(argv, { TEST_PORT: "x" }).integer("port", 0, 9);
    expect(() => port([])).toThrow('TEST_PORT must be a number from 0 to 9, not "x"');
    expect(() => port(["--port", "y"])).toThrow('--port must be a number from 0 to 9, not "y"');
    expect(port(["--port", "1"])).toBe(1);
    expect(() => read([], { TEST_PORT: "" }).integer("port", 0, 9)).toThrow("--port must be"); // the default
  });

  test("refuses what it does not know or cannot use, and says so", () => {
    const cases: [() => unknown, string][] = [
      [() => read(["--prot", "1"]), "--help lists the options"],
      [() => read(["stray"]), "--help lists the options"],
      [() => read(["--port"]), "--help lists the options"],
      [() => read(["--port="]), "--port must not be empty"],
      [() => read(["--port", "1.5"]).integer("port", 0, 9), '--port must be a number from 0 to 9, not "1.5"'],
      [() => read(["--port", "10"]).integer("port", 0, 9), "--port must be a number from 0 to 9"],
      [() => read(["--port", "-1"]).integer("port", 0, 9), '--port must be a number from 0 to 9, not "-1"'],
      [() => read(["--fast", "-1"]), "--help lists the options"],
      [() => read(["--port", "--fast"]), "Option '--port' argument is ambiguous; --help lists the options"],
      [() => read(["--port", "1e999"]).number("port", 0, 9), "--port must be a number from 0 to 9"],
      [() => read(["--mode", "c"]).choice("mode", ["a", "b"]), '--mode must be one of a, b, not "c"'],
      [() => read([]).text("size"), "--size is required"],
    ];
    for (const [body, message] of cases) expect(body).toThrow(message);
  });
});

describe("describeOptions", () => {
  test("has a line per option, with default and variable", () => {
    expect(describeOptions(SPECS).split("\n")).toEqual([
      "  --port N     where to listen (default 80; env TEST_PORT)",
      "  --size SIZE  how much",
      "  --mode a|b   which (default a)",
      "  --fast       hurry",
    ]);
  });
});
