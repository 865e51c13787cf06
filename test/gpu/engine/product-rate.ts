// What the library's products reach on this card: at once, and after a second of them, when the card's clock has
// yielded to its power limit. Prompts are computed at the latter rate.

import { type DeviceAddress, NativeLibrary, NO_ADDRESS } from "../../../sidecar/native.ts";

const SIZE = 8192;
const WARM_UP_MS = 1000;
const BURST = 5;
const SUSTAINED = 300;
const WAIT_US = 1_000_000;

/** TFLOP/s of (8192, 8192) by (8192, 8192) in BF16, about normal values. */
export function productRates(libraryPath: string): { burst: number; sustained: number } {
  const device = new NativeLibrary(libraryPath).openDevice({
    layers: 1, hiddenSize: SIZE, heads: 1, kvHeads: 1, headDim: 64, rotaryDim: 0, vocabSize: SIZE, blockTokens: 64,
    maxPositions: 64, maxRows: SIZE, maxSequences: 1, computeDtype: "bf16", kvDtype: "bf16", attentionScale: 1,
    threadCount: 0, isa: "best", gpuIndex: 0,
  });
  const weight = device.createWeight(SIZE, SIZE, "bf16");
  device.fillWeightRandom(weight, 1, 0.02);
  const [x, y] = [device.alloc(SIZE * SIZE * 2), device.alloc(SIZE * SIZE * 2)];
  fillNormal(device, x);
  const finished = device.createEvent();
  const msOf = (count: number): number => {
    const begin = performance.now();
    for (let i = 0; i < count; i++) {
      device.matmul({ y, x, weight, bias: NO_ADDRESS, rowCount: SIZE, output: "computed" });
    }
    device.record("compute", finished, true);
    while (!device.isDone(finished)) device.wait(WAIT_US);
    return performance.now() - begin;
  };
  msOf(1); // picks the algorithm
  const burst = msOf(BURST) / BURST;
  msOf(Math.ceil(WARM_UP_MS / burst));
  const sustained = msOf(SUSTAINED) / SUSTAINED;
  device.close();
  const tflops = (ms: number): number => (2 * SIZE ** 3) / ms / 1e9;
  return { burst: tflops(burst), sustained: tflops(sustained) };
}

/** A piece of values over and over. */
function fillNormal(device: { copyIn(to: DeviceAddress, source: Uint8Array): void }, x: DeviceAddress): void {
  const floats = Float32Array.from({ length: SIZE * 64 }, () => {
    const sum = Math.random() + Math.random() + Math.random() + Math.random() - 2;
    return sum * Math.sqrt(3);
  });
  const bits = new Uint32Array(floats.buffer);
  const piece = new Uint8Array(Uint16Array.from(bits, (word) => word >>> 16).buffer);
  for (let at = 0; at < SIZE * SIZE * 2; at += piece.length) device.copyIn((x + at) as DeviceAddress, piece);
}
