// Encodes long texts off the main thread; see tokenizer.ts. The first message is the model directory.

import { type EncodeReply, type EncodeRequest, encodeWith, loadHfTokenizer } from "./tokenizer.ts";

declare const self: Worker;

self.onmessage = ({ data: directory }: MessageEvent<string>) => {
  const { tokenizer } = loadHfTokenizer(directory);
  self.onmessage = ({ data: { id, text } }: MessageEvent<EncodeRequest>) => {
    try {
      reply({ id, tokens: encodeWith(tokenizer, text) });
    } catch (error) {
      reply({ id, error: (error as Error).message });
    }
  };
};

function reply(message: EncodeReply): void {
  self.postMessage(message);
}
