// The disk bench's table, with fio and without.

import { expect, test } from "bun:test";
import { fioReaders, rateCells } from "./disk-readers.ts";

test("without fio its columns are left out, and nothing is compared with it", () => {
  expect(Object.keys(fioReaders(null))).toEqual([]);
  expect(rateCells({ "threads (ours)": 1.5, io_uring: null })).toEqual(["1.50", "-"]);
});

test("with fio the others are compared with its better way", () => {
  expect(Object.keys(fioReaders("fio"))).toEqual(["fio, threads", "fio, io_uring"]);
  const rates = { "fio, threads": 1, "fio, io_uring": 2, "threads (ours)": 1.5 };
  expect(rateCells(rates)).toEqual(["1.00", "2.00", "1.50 (75 %)"]);
  expect(rateCells({ "fio, threads": 1, "fio, io_uring": null, io_uring: 1 })).toEqual(["1.00", "-", "1.00 (100 %)"]);
});
