// What the library refuses: every argument and every field of a step that could lead a kernel astray is named in the
// error, and the device works on afterwards. Asked below native.ts, whose own checks would be first.

import { afterAll, expect, test } from "bun:test";
import { type HostBuffer, hostView, NativeError, type Pointer, Status } from "../../../sidecar/native.ts";
import { cpuLibrary } from "../../support/cpu-library.ts";
import { OperationDevice, rowsOf } from "../../support/operation-device.ts";

const operations = new OperationDevice({ rotaryDim: 16, maxRows: 16, maxPositions: 64, vocabSize: 40 });
const { device } = operations;
const { symbols } = cpuLibrary;
const handle = device.handle as Pointer;
const memory = operations.poisoned(4096);
const host = device.allocHost(65536);
const weight = operations.weight(40, 32, "f32", new Float32Array(40 * 32)) as number as Pointer;
const elsewhere = operations.weight(8, 8, "f32", new Float32Array(64)) as number as Pointer;
const event = device.createEvent();
const out = new BigUint64Array(2);
device.setRope(new Float64Array(8));
device.createKv(4);
const bytes = new Uint8Array(64);
const float = new Float32Array(64);
const [zero, four] = [Int32Array.of(0), Int32Array.of(4)];

afterAll(() => operations[Symbol.dispose]());

function refused(status: number, message: RegExp, expected: number = Status.invalid): void {
  const text = String(symbols.kvs_last_error());
  expect([status, text]).toEqual([expected, expect.stringMatching(message)]);
}

const CALLS: readonly (readonly [name: string, call: () => number, message: RegExp, status?: number])[] = [
  ["no device", () => symbols.kvs_post(null), /device must not be null/],
  ["info without memory", () => symbols.kvs_device_info(handle, bytes, 0), /json/],
  ["no bytes", () => symbols.kvs_alloc(handle, 0, out), /positive/],
  ["too many bytes", () => symbols.kvs_alloc(handle, 2 ** 52, out), /memory/, Status.outOfMemory],
  ["an address that is no allocation", () => symbols.kvs_free(handle, memory + 4), /not an allocation/],
  ["host memory that is none", () => symbols.kvs_free_host(handle, memory), /not an allocation/],
  ["a weight without rows", () => symbols.kvs_weight_create(handle, 0, 4, 0, out), /positive/],
  ["a dtype that weights cannot have", () => symbols.kvs_weight_create(handle, 4, 4, 3, out), /F32, F16 or BF16/,
    Status.unsupported],
  ["rows past a weight's end", () => symbols.kvs_weight_upload(handle, weight, 39, 2, float, 0), /\[39, \+2\) of 40/],
  ["a weight that is none", () => symbols.kvs_weight_free(handle, memory as number as Pointer), /not a weight/],
  ["a deviation that is NaN", () => symbols.kvs_weight_fill_random(handle, weight, 1, NaN), /deviation/],
  ["a frequency that is NaN", () => symbols.kvs_set_rope(handle, new Float64Array(8).fill(NaN)), /frequency 0/],
  ["a slope that is infinite", () => symbols.kvs_set_alibi(handle, Float32Array.of(Infinity)), /slope 0/],
  ["an event that is none", () => symbols.kvs_event_query(handle, event + 99), /no event/],
  ["a stream that is none", () => symbols.kvs_record(handle, 3, event, 0), /no stream 3/],
  ["a token slot that is none", () => symbols.kvs_write_tokens(handle, 8, 0, new Int32Array(1), 1), /slot 8 of 8/],
  ["tokens past a slot's end", () => symbols.kvs_write_tokens(handle, 0, 60, new Int32Array(6), 6), /do not fit/],
  ["a token id past the vocabulary", () => symbols.kvs_write_tokens(handle, 0, 0, Int32Array.of(40), 1), /id 40 of 40/],
  ["a negative token id", () => symbols.kvs_write_tokens(handle, 0, 0, Int32Array.of(-1), 1), /id -1/],
  ["too many rows", () => symbols.kvs_gelu(handle, memory, memory, 17, 4), /17 rows, 1 to 16/],
  ["no rows", () => symbols.kvs_silu_mul(handle, memory, memory, 0, 4), /0 rows/],
  ["memory too small", () => symbols.kvs_gelu(handle, memory, memory, 16, 257), /y: 16448 bytes .* not device memory/],
  ["memory of the host", () => symbols.kvs_gelu(handle, host.address, memory, 1, 4), /y: .* not device memory/],
  ["an address between two floats", () => symbols.kvs_gelu(handle, memory, memory + 2, 1, 4), /x: .*/],
  ["a size of zero", () => symbols.kvs_rms_norm(handle, memory, memory, memory, 1, 0, 0), /size must be positive/],
  ["a negative epsilon", () => symbols.kvs_layer_norm(handle, memory, memory, memory, 0, 1, 4, -1), /epsilon/],
  ["a weight of the wrong shape", () => symbols.kvs_embed(handle, memory, elsewhere, 2), /weight is \(8, 8\)/],
  ["rows other than the step's", () => symbols.kvs_embed(handle, memory, weight, 3), /the step .* has 2/],
  ["flags that are none", () => symbols.kvs_matmul(handle, memory, memory, elsewhere, 0, 1, 4), /flags 4/],
  ["a layer that is none", () => symbols.kvs_attention(handle, memory, memory, 1, 0, 2), /no layer 1 of 1/],
  ["logit rows other than the step's", () => symbols.kvs_sample(handle, memory, host.address, 2), /has 1/],
  ["results outside host memory", () => symbols.kvs_sample(handle, memory, memory, 1), /results: .* kvs_alloc_host/],
  ["a copy past the end", () => symbols.kvs_copy_out(handle, host.address, memory, 16388), /source: 16388 bytes/],
  ["a copy from nowhere", () => symbols.kvs_copy_in(handle, memory + 16384, float, 4), /destination/],
  ["a block that is none", () => symbols.kvs_copy_blocks(handle, four, zero, 1), /block 4 of 4/],
  ["no host arena", () => symbols.kvs_load_layer(handle, 0, zero, zero, 1, event), /no host arena/],
  ["a graph", () => symbols.kvs_graph_begin(handle, 1), /no graphs/, Status.unsupported],
];

test.each(CALLS)("%s", (_, call, message, status = Status.invalid) => {
  operations.begin([{ ...rowsOf(0, 0, 2, [0]), logits: "last" }]);
  refused(call(), message, status);
  const y = operations.place(Float32Array.of(0));
  device.gelu({ y, x: y, rowCount: 1, size: 1 });
  expect(operations.read(y, 1)[0]).toBe(0);
  device.free(y);
});

test("host slots outside the arena", () => {
  device.openHostArena(null, 2);
  refused(symbols.kvs_save_layer(handle, 0, zero, Int32Array.of(2), 1, event), /no host slot 2 of 2/);
  refused(symbols.kvs_save_layer(handle, 0, zero, Int32Array.of(-1), 1, event), /no host slot -1/);
  refused(symbols.kvs_load_layer(handle, 1, zero, zero, 1, event), /no layer 1/);
  device.closeHostArena(false);
});

// ---- steps: a good one, with one int32 changed

const HEADER = {
  rowCount: 0, sequenceCount: 1, logitCount: 2, sequencesAt: 3, rowSequenceAt: 4, rowPositionAt: 5, blockTableAt: 6,
  logitRowAt: 7, samplingAt: 8,
};

function stepOf(): { buffer: HostBuffer; ints: Int32Array; bytes: number } {
  const batch = operations.begin([
    rowsOf(1, 6, 4, [2, 0]),
    { ...rowsOf(5, 0, 1, [1]), logits: "last" },
  ]);
  const buffer = device.allocHost(batch.stepBytes);
  new Uint8Array(buffer.bytes).set(new Uint8Array(hostView(batch.stepAddress, batch.stepBytes)));
  return { buffer, ints: new Int32Array(buffer.bytes), bytes: batch.stepBytes };
}

const good = stepOf();
const at = (field: keyof typeof HEADER, offset: number): number => good.ints[HEADER[field]]! + offset;
const BROKEN: readonly (readonly [name: string, index: number, value: number, message: RegExp])[] = [
  ["no rows", HEADER.rowCount, 0, /0 rows, 1 to 16/],
  ["more rows than the device takes", HEADER.rowCount, 17, /17 rows/],
  ["more sequences than slots", HEADER.sequenceCount, 9, /9 sequences of 8/],
  ["a negative number of logit rows", HEADER.logitCount, -1, /-1 logit rows/],
  ["sequences in the header", HEADER.sequencesAt, 3, /sequences lies outside/],
  ["positions past the end", HEADER.rowPositionAt, 1 << 28, /row_position lies outside/],
  ["a block table before the step", HEADER.blockTableAt, -5, /block table/],
  ["a token slot that is none", at("sequencesAt", 0), 8, /slot 8 of 8/],
  ["rows of a sequence outside the step", at("sequencesAt", 2), 12, /rows outside/],
  ["a sequence without rows", at("sequencesAt", 2), 0, /rows outside/],
  ["a block table that is too short", at("sequencesAt", 7), 1000, /too short/],
  ["a row of another sequence", at("rowSequenceAt", 1), 1, /row 1 does not continue sequence 0/],
  ["a row of no sequence that is", at("rowSequenceAt", 4), 2, /row 4 names sequence 2/],
  ["positions with a gap", at("rowPositionAt", 2), 9, /row 2 does not continue/],
  ["positions past the longest view", at("rowPositionAt", 0), 62, /positions past 64/],
  ["a negative position", at("rowPositionAt", 4), -1, /positions past/],
  ["a block that is none", at("blockTableAt", 1), 4, /block 4 of 4/],
  ["a logit row that is none", at("logitRowAt", 0), 5, /logit row 0 is row 5/],
  ["sampling for another sequence", at("samplingAt", 0), 0, /not of sequence 0/],
  ["a negative temperature", at("samplingAt", 1), floatBits(-1), /temperature/],
  ["a top_p of zero", at("samplingAt", 3), 0, /top_p/],
  ["a min_p that is NaN", at("samplingAt", 4), floatBits(NaN), /min_p/],
  ["a penalty that is infinite", at("samplingAt", 5), floatBits(Infinity), /penalties/],
  ["a repetition penalty of zero", at("samplingAt", 7), 0, /penalties/],
  ["biases outside the step", at("samplingAt", 13), 1 << 24, /bias/],
  ["too many rivals", at("samplingAt", 14), 21, /top_logprobs/],
];

test.each(BROKEN)("a step with %s", (_, index, value, message) => {
  const before = good.ints[index]!;
  good.ints[index] = value;
  refused(symbols.kvs_begin_step(handle, good.buffer.address as number as Pointer, good.bytes), message);
  good.ints[index] = before;
  device.beginStep(good.buffer.address, good.bytes);
});

test("a step that is cut short, or not in host memory", () => {
  const address = good.buffer.address as number as Pointer;
  refused(symbols.kvs_begin_step(handle, address, 40), /no header/);
  refused(symbols.kvs_begin_step(handle, address, good.bytes + 4096), /step: .* kvs_alloc_host/);
  refused(symbols.kvs_begin_step(handle, memory as number as Pointer, 48), /step: .* kvs_alloc_host/);
});

// ---- devices

const CONFIGS = [
  ["layers", { layers: 0 }, /layers: 0/],
  ["heads that kv_heads do not divide", { heads: 3, kvHeads: 2 }, /multiple of kv_heads/],
  ["a head too large", { headDim: 513 }, /head_dim: 513/],
  ["more rotated dims than dims", { headDim: 16, rotaryDim: 18 }, /rotary_dim 18 of head_dim 16/],
  ["an odd number of rotated dims", { rotaryDim: 3 }, /rotary_dim 3/],
  ["a block size that is no power of two", { blockTokens: 12 }, /block_tokens: 12/],
  ["a block too small", { blockTokens: 4 }, /block_tokens: 4/],
  ["activations other than F32", { computeDtype: "bf16" }, /computes in F32/],
  ["a KV dtype of 8 bits", { kvDtype: "f8e4m3" }, /keeps KV/],
  ["a scale of NaN", { attentionScale: NaN }, /attention_scale/],
  ["too many threads", { threadCount: 5000 }, /5000 threads/],
] as const;

test.each(CONFIGS)("a device with %s", (_, config, message) => {
  expect(() => new OperationDevice(config)).toThrow(message);
  expect(() => new OperationDevice(config)).toThrow(NativeError);
});

test("attention before there are blocks or a RoPE table", () => {
  using bare = new OperationDevice({ rotaryDim: 16 });
  bare.begin([rowsOf(0, 0, 1, [-1])]);
  const y = bare.poisoned(64);
  const attend = (): void => bare.device.attention({ y, q: y, layer: 0, window: 0, rowCount: 1 });
  expect(attend).toThrow("kvs_kv_create first");
  bare.device.createKv(1);
  expect(attend).toThrow("kvs_set_rope first");
});

function floatBits(value: number): number {
  return new Int32Array(Float32Array.of(value).buffer)[0]!;
}
