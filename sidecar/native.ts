// The only importer of bun:ffi: the C ABI of native/kvasir.h as typed TypeScript. bun:ffi checks nothing
// (-1 becomes 4294967295, a missing argument 0), so every argument is checked here, and every status
// becomes a NativeError here.

import { dlopen, type Pointer, toArrayBuffer } from "bun:ffi";
import { assert, assertU32 } from "./assert.ts";
import { assertAddress, assertAddresses, assertPositive, assertSize, cString } from "./native-arguments.ts";
import { NativeError, Status } from "./native-error.ts";
import { SYMBOLS } from "./native-symbols.ts";

export { NativeError, type Pointer, Status };

export const ABI_VERSION = 1;

export type DType = "f32" | "f16" | "bf16" | "f8e4m3";
const DTYPE_CODES: Record<DType, number> = { f32: 0, f16: 1, bf16: 2, f8e4m3: 3 };
export const DTYPE_BYTES: Record<DType, number> = { f32: 4, f16: 2, bf16: 2, f8e4m3: 1 };

/** What becomes of y: "computed", it is of the compute type; "f32", it is F32; "added", it is F32 and added to. */
export type ProductOutput = "computed" | "added" | "f32";
const PRODUCT_FLAGS: Record<ProductOutput, number> = { computed: 0, added: 1, f32: 2 };

export type Stream = "compute" | "load" | "save";
const STREAM_CODES: Record<Stream, number> = { compute: 0, load: 1, save: 2 };

export type Isa = "best" | "avx512" | "avx2" | "portable";
const ISA_CODES: Record<Isa, number> = { best: 0, avx512: 1, avx2: 2, portable: 3 };

/** An address in device memory; address + byte offset is one too. 0 stands for "none" where allowed. */
export type DeviceAddress = number & { readonly brand: "DeviceAddress" };
export const NO_ADDRESS = 0 as DeviceAddress;
/** An address of host memory that the streams can reach. */
export type HostAddress = number & { readonly brand: "HostAddress" };
export type WeightHandle = number & { readonly brand: "WeightHandle" };
/** Index of a completion event of one device. */
export type EventHandle = number & { readonly brand: "EventHandle" };

/** Fixed for the life of a device; see kvs_device_config. */
export interface DeviceConfig {
  readonly layers: number;
  readonly hiddenSize: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Leading dims of a head that RoPE turns; 0: none. */
  readonly rotaryDim: number;
  readonly vocabSize: number;
  readonly blockTokens: number;
  readonly maxPositions: number;
  readonly maxRows: number;
  readonly maxSequences: number;
  readonly computeDtype: DType;
  readonly kvDtype: DType;
  readonly attentionScale: number;
  /** CPU compute threads; 0: cores - 1. */
  readonly threadCount: number;
  readonly isa: Isa;
  readonly gpuIndex: number;
}

/** Host memory of kvs_alloc_host: the same bytes for JavaScript and for the streams. */
export interface HostBuffer {
  readonly address: HostAddress;
  readonly bytes: ArrayBuffer;
}

export interface HostArena {
  readonly slotsAddress: HostAddress;
  readonly headersAddress: HostAddress;
  readonly isShared: boolean;
  readonly isAdopted: boolean;
}

type Symbols = ReturnType<typeof dlopen<typeof SYMBOLS>>["symbols"];

/** A loaded compute library. One per process and path is enough: its state is shared by all threads. */
export class NativeLibrary {
  readonly symbols: Symbols;

  /** Throws NativeError when the file is missing, is not ours or speaks another ABI version. */
  constructor(readonly path: string) {
    try {
      this.symbols = dlopen(path, SYMBOLS).symbols;
    } catch (error) {
      throw new NativeError(Status.unsupported, `cannot load ${path}: ${(error as Error).message}`);
    }
    const version = this.symbols.kvs_abi_version();
    if (version !== ABI_VERSION) {
      throw new NativeError(
        Status.unsupported,
        `${path} speaks ABI ${version}, this program ${ABI_VERSION}: delete build/ and start again`,
      );
    }
  }

  /** Throws NativeError unless `status` is ok. */
  check(status: number): void {
    if (status !== Status.ok) throw this.error(status);
  }

  error(status: number): NativeError {
    return new NativeError(status, String(this.symbols.kvs_last_error()));
  }

  openDevice(config: DeviceConfig): Device {
    return new Device(this, config);
  }

  /** Advice that these bytes of an open file will be read soon. */
  readAhead(descriptor: number, offsetBytes: number, bytes: number): void {
    assertU32(descriptor, "descriptor");
    assertSize(bytes, "bytes");
    this.symbols.kvs_read_ahead(descriptor, offsetBytes, bytes);
  }

  /** 64-bit checksum of host memory, as an unsigned bigint. */
  checksum(address: HostAddress, bytes: number): bigint {
    assertAddress(address, "address");
    assertSize(bytes, "bytes");
    return BigInt.asUintN(64, BigInt(this.symbols.kvs_checksum(address as number as Pointer, bytes)));
  }
}

/** One compute device and its streams, memory and KV blocks. Driven by one thread, except post(). */
export class Device {
  readonly #library: NativeLibrary;
  readonly #symbols: Symbols;
  #handle: Pointer;
  readonly #out = new BigUint64Array(2);

  constructor(
    library: NativeLibrary,
    readonly config: DeviceConfig,
  ) {
    this.#library = library;
    this.#symbols = library.symbols;
    library.check(this.#symbols.kvs_open(encodeConfig(config), this.#out));
    this.#handle = Number(this.#out[0]) as Pointer;
  }

  /** The address another thread needs for postTo(). */
  get handle(): number {
    return this.#handle;
  }

  close(): void {
    if (this.#handle === 0) return;
    this.#check(this.#symbols.kvs_close(this.#handle));
    this.#handle = 0 as Pointer;
  }

  /** What the library says about itself: backend, name, isa, threads, numeric_mode, ... */
  info(): Record<string, string | number> {
    const text = new Uint8Array(4096);
    this.#check(this.#symbols.kvs_device_info(this.#handle, text, text.length));
    return JSON.parse(new TextDecoder().decode(text.subarray(0, text.indexOf(0))));
  }

  memoryInfo(): { freeBytes: number; totalBytes: number } {
    const total = new BigUint64Array(1);
    this.#check(this.#symbols.kvs_memory_info(this.#handle, this.#out, total));
    return { freeBytes: Number(this.#out[0]), totalBytes: Number(total[0]) };
  }

  /** inverseFrequencies: (rotaryDim / 2), radians per position. */
  setRope(inverseFrequencies: Float64Array): void {
    assert(inverseFrequencies.length * 2 === this.config.rotaryDim, "one frequency per rotated pair");
    this.#check(this.#symbols.kvs_set_rope(this.#handle, inverseFrequencies));
  }

  /** slopes: (heads). */
  setAlibi(slopes: Float32Array): void {
    assert(slopes.length === this.config.heads, "one slope per head");
    this.#check(this.#symbols.kvs_set_alibi(this.#handle, slopes));
  }

  alloc(bytes: number): DeviceAddress {
    assertSize(bytes, "bytes");
    this.#check(this.#symbols.kvs_alloc(this.#handle, bytes, this.#out));
    return Number(this.#out[0]) as DeviceAddress;
  }

  free(address: DeviceAddress): void {
    assertAddress(address, "address");
    this.#check(this.#symbols.kvs_free(this.#handle, address));
  }

  /** Keep the buffer's address, not slices of its ArrayBuffer, for the native side. At most 4 GiB. */
  allocHost(bytes: number): HostBuffer {
    assertSize(bytes, "bytes");
    assert(bytes <= 2 ** 32, "a host buffer is at most 4 GiB");
    this.#check(this.#symbols.kvs_alloc_host(this.#handle, bytes, this.#out));
    const address = Number(this.#out[0]) as HostAddress;
    return { address, bytes: hostView(address, bytes) };
  }

  freeHost(address: HostAddress): void {
    assertAddress(address, "address");
    this.#check(this.#symbols.kvs_free_host(this.#handle, address));
  }

  // ---- weights

  createWeight(rows: number, cols: number, dtype: DType): WeightHandle {
    assertPositive(rows, "rows");
    assertPositive(cols, "cols");
    const status = this.#symbols.kvs_weight_create(this.#handle, rows, cols, DTYPE_CODES[dtype], this.#out);
    this.#check(status);
    return Number(this.#out[0]) as WeightHandle;
  }

  /** source: rowCount rows of the weight's cols in sourceDtype. Blocking. */
  uploadWeight(args: {
    weight: WeightHandle;
    rowBegin: number;
    rowCount: number;
    source: Uint8Array;
    sourceDtype: DType;
  }): void {
    assertAddress(args.weight, "weight");
    assertU32(args.rowBegin, "rowBegin");
    assertPositive(args.rowCount, "rowCount");
    assert(args.source.length % (args.rowCount * DTYPE_BYTES[args.sourceDtype]) === 0, "source is not whole rows");
    const { weight, rowBegin, rowCount, source, sourceDtype } = args;
    this.#check(
      this.#symbols.kvs_weight_upload(
        this.#handle,
        weight as number as Pointer,
        rowBegin,
        rowCount,
        source,
        DTYPE_CODES[sourceDtype],
      ),
    );
  }

  fillWeightRandom(weight: WeightHandle, seed: number, deviation: number): void {
    assertAddress(weight, "weight");
    this.#check(
      this.#symbols.kvs_weight_fill_random(this.#handle, weight as number as Pointer, seed, deviation),
    );
  }

  freeWeight(weight: WeightHandle): void {
    assertAddress(weight, "weight");
    this.#check(this.#symbols.kvs_weight_free(this.#handle, weight as number as Pointer));
  }

  // ---- events

  createEvent(): EventHandle {
    const event = new Uint32Array(1);
    this.#check(this.#symbols.kvs_event_create(this.#handle, event));
    return event[0] as EventHandle;
  }

  /** The event is pending until `stream` gets here; a watched one wakes wait(). */
  record(stream: Stream, event: EventHandle, watch: boolean): void {
    this.#check(this.#symbols.kvs_record(this.#handle, STREAM_CODES[stream], event, watch ? 1 : 0));
  }

  streamWait(stream: Stream, event: EventHandle): void {
    this.#check(this.#symbols.kvs_stream_wait(this.#handle, STREAM_CODES[stream], event));
  }

  /** False while pending. Throws NativeError when what it waited for failed. */
  isDone(event: EventHandle): boolean {
    const status = this.#symbols.kvs_event_query(this.#handle, event);
    if (status === Status.pending) return false;
    this.#check(status);
    return true;
  }

  /** Blocks this thread until a watched event ended or post() was called; false on time-out. */
  wait(timeoutUs: number): boolean {
    assertU32(timeoutUs, "timeoutUs");
    const status = this.#symbols.kvs_wait(this.#handle, timeoutUs);
    if (status === Status.timeout) return false;
    this.#check(status);
    return true;
  }

  post(): void {
    this.#check(this.#symbols.kvs_post(this.#handle));
  }

  // ---- step input

  writeTokens(slot: number, position: number, ids: Int32Array): void {
    assert(Number.isInteger(slot) && slot >= 0 && slot < this.config.maxSequences, `no slot ${slot}`);
    assert(position >= 0 && position + ids.length <= this.config.maxPositions + 1, "tokens past the slot's end");
    if (ids.length === 0) return;
    this.#check(this.#symbols.kvs_write_tokens(this.#handle, slot, position, ids, ids.length));
  }

  beginStep(step: HostAddress, bytes: number): void {
    assertAddress(step, "step");
    assertPositive(bytes, "bytes");
    this.#check(this.#symbols.kvs_begin_step(this.#handle, step as number as Pointer, bytes));
  }

  // ---- operations, on the compute stream; shapes in kvasir.h

  embed(args: { y: DeviceAddress; weight: WeightHandle; rowCount: number }): void {
    this.#assertRows(args.rowCount);
    assertAddress(args.y, "y");
    assertAddress(args.weight, "weight");
    this.#check(
      this.#symbols.kvs_embed(this.#handle, args.y, args.weight as number as Pointer, args.rowCount),
    );
  }

  rmsNorm(args: {
    y: DeviceAddress;
    x: DeviceAddress;
    weight: DeviceAddress;
    rowCount: number;
    size: number;
    epsilon: number;
  }): void {
    const { y, x, weight, rowCount, size, epsilon } = args;
    this.#assertRows(rowCount);
    assertAddresses({ y, x, weight });
    assertPositive(size, "size");
    this.#check(this.#symbols.kvs_rms_norm(this.#handle, y, x, weight, rowCount, size, epsilon));
  }

  layerNorm(args: {
    y: DeviceAddress;
    x: DeviceAddress;
    weight: DeviceAddress;
    bias: DeviceAddress;
    rowCount: number;
    size: number;
    epsilon: number;
  }): void {
    const { y, x, weight, bias, rowCount, size, epsilon } = args;
    this.#assertRows(rowCount);
    assertAddresses({ y, x, weight });
    assertPositive(size, "size");
    this.#check(this.#symbols.kvs_layer_norm(this.#handle, y, x, weight, bias, rowCount, size, epsilon));
  }

  matmul(args: {
    y: DeviceAddress;
    x: DeviceAddress;
    weight: WeightHandle;
    bias: DeviceAddress;
    rowCount: number;
    output: ProductOutput;
  }): void {
    const { y, x, weight, bias, rowCount, output } = args;
    this.#assertRows(rowCount);
    assertAddresses({ y, x, weight });
    this.#check(
      this.#symbols.kvs_matmul(
        this.#handle, y, x, weight as number as Pointer, bias, rowCount, PRODUCT_FLAGS[output],
      ),
    );
  }

  appendKv(args: {
    q: DeviceAddress;
    qkv: DeviceAddress;
    layer: number;
    qNorm: DeviceAddress;
    kNorm: DeviceAddress;
    rowCount: number;
    epsilon: number;
  }): void {
    const { q, qkv, layer, qNorm, kNorm, rowCount, epsilon } = args;
    this.#assertRows(rowCount);
    this.#assertLayer(layer);
    assertAddresses({ q, qkv });
    this.#check(
      this.#symbols.kvs_append_kv(this.#handle, q, qkv, layer, qNorm, kNorm, rowCount, epsilon),
    );
  }

  /** window 0: attends to the whole view. */
  attention(args: {
    y: DeviceAddress;
    q: DeviceAddress;
    layer: number;
    window: number;
    rowCount: number;
  }): void {
    const { y, q, layer, window, rowCount } = args;
    this.#assertRows(rowCount);
    this.#assertLayer(layer);
    assertAddresses({ y, q });
    assertU32(window, "window");
    this.#check(this.#symbols.kvs_attention(this.#handle, y, q, layer, window, rowCount));
  }

  siluMul(args: { y: DeviceAddress; x: DeviceAddress; rowCount: number; size: number }): void {
    this.#assertRows(args.rowCount);
    assertAddresses({ y: args.y, x: args.x });
    assertPositive(args.size, "size");
    this.#check(this.#symbols.kvs_silu_mul(this.#handle, args.y, args.x, args.rowCount, args.size));
  }

  gelu(args: { y: DeviceAddress; x: DeviceAddress; rowCount: number; size: number }): void {
    this.#assertRows(args.rowCount);
    assertAddresses({ y: args.y, x: args.x });
    assertPositive(args.size, "size");
    this.#check(this.#symbols.kvs_gelu(this.#handle, args.y, args.x, args.rowCount, args.size));
  }

  gatherLogitRows(args: {
    y: DeviceAddress;
    x: DeviceAddress;
    logitCount: number;
    size: number;
  }): void {
    this.#assertRows(args.logitCount);
    assertAddresses({ y: args.y, x: args.x });
    assertPositive(args.size, "size");
    this.#check(
      this.#symbols.kvs_gather_logit_rows(this.#handle, args.y, args.x, args.logitCount, args.size),
    );
  }

  sample(args: { logits: DeviceAddress; results: HostAddress; logitCount: number }): void {
    this.#assertRows(args.logitCount);
    assertAddresses({ logits: args.logits, results: args.results });
    this.#check(
      this.#symbols.kvs_sample(this.#handle, args.logits, args.results, args.logitCount),
    );
  }

  copyOut(destination: HostAddress, source: DeviceAddress, bytes: number): void {
    assertAddresses({ destination, source });
    assertSize(bytes, "bytes");
    this.#check(this.#symbols.kvs_copy_out(this.#handle, destination, source, bytes));
  }

  copyIn(destination: DeviceAddress, source: Uint8Array | Float32Array | Int32Array): void {
    assertAddress(destination, "destination");
    this.#check(
      this.#symbols.kvs_copy_in(this.#handle, destination, source, source.byteLength),
    );
  }

  // ---- graphs

  /** False where this library cannot capture: then call the operations every time. */
  graphBegin(key: number): boolean {
    assertU32(key, "key");
    const status = this.#symbols.kvs_graph_begin(this.#handle, key);
    if (status === Status.unsupported) return false;
    this.#check(status);
    return true;
  }

  graphEnd(key: number): void {
    this.#check(this.#symbols.kvs_graph_end(this.#handle, key));
  }

  graphLaunch(key: number): void {
    this.#check(this.#symbols.kvs_graph_launch(this.#handle, key));
  }

  // ---- KV blocks

  createKv(blockCount: number): void {
    assertPositive(blockCount, "blockCount");
    this.#check(this.#symbols.kvs_kv_create(this.#handle, blockCount));
  }

  /** slotBytes: blockBytes rounded up to 4096, the stride in host memory and on disk. */
  blockBytes(): { blockBytes: number; slotBytes: number } {
    const slotBytes = new BigUint64Array(1);
    this.#check(this.#symbols.kvs_block_bytes(this.#handle, this.#out, slotBytes));
    return { blockBytes: Number(this.#out[0]), slotBytes: Number(slotBytes[0]) };
  }

  /** Whole blocks, in the compute stream's order. */
  copyBlocks(sources: Int32Array, destinations: Int32Array): void {
    assert(sources.length === destinations.length, "as many sources as destinations");
    if (sources.length === 0) return;
    this.#check(
      this.#symbols.kvs_copy_blocks(this.#handle, sources, destinations, sources.length),
    );
  }

  /** Host slots -> gpu blocks, one layer, load stream. False: queue full, nothing happened. */
  loadLayer(layer: number, hostSlots: Int32Array, blocks: Int32Array, event: EventHandle): boolean {
    this.#assertLayer(layer);
    assert(hostSlots.length === blocks.length && blocks.length > 0, "as many slots as blocks");
    return this.#unlessBusy(
      this.#symbols.kvs_load_layer(this.#handle, layer, hostSlots, blocks, blocks.length, event),
    );
  }

  /** Gpu blocks -> host slots, one layer, save stream. False: queue full, nothing happened. */
  saveLayer(layer: number, blocks: Int32Array, hostSlots: Int32Array, event: EventHandle): boolean {
    this.#assertLayer(layer);
    assert(hostSlots.length === blocks.length && blocks.length > 0, "as many slots as blocks");
    return this.#unlessBusy(
      this.#symbols.kvs_save_layer(this.#handle, layer, blocks, hostSlots, blocks.length, event),
    );
  }

  /** name: POSIX shared-memory name, or null for memory that dies with the process. */
  openHostArena(name: string | null, slotCount: number): HostArena {
    assertPositive(slotCount, "slotCount");
    const out = new ArrayBuffer(24);
    const nameBytes = name === null ? null : cString(name);
    this.#check(
      this.#symbols.kvs_host_arena_open(this.#handle, nameBytes, slotCount, new Uint8Array(out)),
    );
    const words = new BigUint64Array(out, 0, 2);
    const flags = new Uint32Array(out, 16, 2);
    return {
      slotsAddress: Number(words[0]) as HostAddress,
      headersAddress: Number(words[1]) as HostAddress,
      isShared: flags[0] === 1,
      isAdopted: flags[1] === 1,
    };
  }

  closeHostArena(unlink: boolean): void {
    this.#check(this.#symbols.kvs_host_arena_close(this.#handle, unlink ? 1 : 0));
  }

  #check(status: number): void {
    if (status !== Status.ok) throw this.#library.error(status);
  }

  #unlessBusy(status: number): boolean {
    if (status === Status.busy) return false;
    this.#check(status);
    return true;
  }

  #assertRows(rowCount: number): void {
    const { maxRows } = this.config;
    assert(Number.isInteger(rowCount) && rowCount > 0 && rowCount <= maxRows, `${rowCount} rows of ${maxRows}`);
  }

  #assertLayer(layer: number): void {
    assert(Number.isInteger(layer) && layer >= 0 && layer < this.config.layers, `no layer ${layer}`);
  }
}

/** A view of native memory; make it once and keep it (about 40 us each, at most 4 GiB). */
export function hostView(address: HostAddress, bytes: number): ArrayBuffer {
  assertAddress(address, "address");
  return toArrayBuffer(address as number as Pointer, 0, bytes);
}

/** Wakes the wait() of a device that another thread drives; `handle` is its Device.handle. */
export function postTo(library: NativeLibrary, handle: number): void {
  assertAddress(handle, "handle");
  library.check(library.symbols.kvs_post(handle as Pointer));
}

function encodeConfig(config: DeviceConfig): Uint8Array {
  const words = new Uint32Array(18);
  const counts = [
    words.byteLength,
    config.layers,
    config.hiddenSize,
    config.heads,
    config.kvHeads,
    config.headDim,
    config.rotaryDim,
    config.vocabSize,
    config.blockTokens,
    config.maxPositions,
    config.maxRows,
    config.maxSequences,
    DTYPE_CODES[config.computeDtype],
    DTYPE_CODES[config.kvDtype],
  ];
  counts.forEach((count, index) => assertU32(count, `device config word ${index}`));
  words.set(counts);
  new Float32Array(words.buffer)[14] = config.attentionScale;
  words.set([config.threadCount, ISA_CODES[config.isa], config.gpuIndex], 15);
  return new Uint8Array(words.buffer);
}
