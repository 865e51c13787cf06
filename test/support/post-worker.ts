// Posts to a device from a thread of its own, once it is told which.

import { NativeLibrary, postTo } from "../../sidecar/native.ts";

declare const self: Worker;

self.onmessage = ({ data }: MessageEvent<{ path: string; handle: number }>) => {
  postTo(new NativeLibrary(data.path), data.handle);
};
