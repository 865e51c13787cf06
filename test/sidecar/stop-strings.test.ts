// Stop strings found in pieces are the ones found in the whole.

import { describe, expect, test } from "bun:test";
import { StopScanner } from "../../sidecar/stop-strings.ts";
import { SeededRandom, testSeed } from "../support/seeded-random.ts";

/** Pushes the pieces until it stops. */
function scan(stops: readonly string[], pieces: readonly string[]): { text: string; isStopped: boolean } {
  const scanner = new StopScanner(stops);
  let text = "";
  for (const piece of pieces) {
    const result = scanner.push(piece);
    text += result.text;
    if (result.isStopped) return { text, isStopped: true };
  }
  return { text: text + scanner.flush(), isStopped: false };
}

/** Character by character: the first stop string to be complete ends the text. */
function reference(stops: readonly string[], whole: string): { text: string; isStopped: boolean } {
  for (let end = 1; end <= whole.length; end++) {
    const head = whole.slice(0, end);
    const found = stops.filter((stop) => head.endsWith(stop)).sort((a, b) => b.length - a.length)[0];
    if (found !== undefined) return { text: head.slice(0, end - found.length), isStopped: true };
  }
  return { text: whole, isStopped: false };
}

describe("StopScanner", () => {
  test("without stop strings nothing is held back", () => {
    expect(new StopScanner([]).push("abc")).toEqual({ text: "abc", isStopped: false });
  });

  test("finds a stop string that crosses pieces, and holds back only what may become one", () => {
    const scanner = new StopScanner(["END"]);
    expect(scanner.push("text E")).toEqual({ text: "text ", isStopped: false });
    expect(scanner.push("N")).toEqual({ text: "", isStopped: false });
    expect(scanner.push("ough E")).toEqual({ text: "ENough ", isStopped: false });
    expect(scanner.push("ND and more")).toEqual({ text: "", isStopped: true });
  });

  test("gives back at the end what was no stop string after all", () => {
    const scanner = new StopScanner(["\n\nUser:"]);
    expect(scanner.push("bye\n\nUs").text).toBe("bye");
    expect(scanner.flush()).toBe("\n\nUs");
    expect(scanner.flush()).toBe("");
  });

  test("the stop string that is complete first counts, however the text is cut", () => {
    const stops = ["abcd", "bc"];
    expect(scan(stops, ["xabcd"])).toEqual({ text: "xa", isStopped: true });
    expect(scan(stops, ["xabc", "d"])).toEqual({ text: "xa", isStopped: true });
    expect(scan(["abc", "bc", "c"], ["xabc"])).toEqual({ text: "x", isStopped: true });
  });

  test("characters outside the basic plane are neither cut nor missed", () => {
    expect(scan(["🙂x"], ["a🙂", "🙂", "x"])).toEqual({ text: "a🙂", isStopped: true });
    expect(new StopScanner(["🙂x"]).push("a🙃")).toEqual({ text: "a🙃", isStopped: false });
  });

  const seed = testSeed();
  test(`equals searching the whole text (seed ${seed})`, () => {
    const random = new SeededRandom(seed);
    const letters = (min: number, max: number) =>
      Array.from({ length: random.integer(min, max) }, () => "ab\n🙂"[random.integer(0, 2)]!).join("");
    let stopped = 0;
    for (let round = 0; round < 3000; round++) {
      const stops = Array.from({ length: random.integer(1, 4) }, () => letters(1, 6));
      const pieces = Array.from({ length: random.integer(1, 12) }, () => letters(0, 4));
      const expected = reference(stops, pieces.join(""));
      expect(scan(stops, pieces), JSON.stringify({ stops, pieces })).toEqual(expected);
      stopped += Number(expected.isStopped);
    }
    expect(stopped).toBeGreaterThan(500);
    expect(stopped).toBeLessThan(3000);
  });
});
