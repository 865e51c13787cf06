// A submitted request with neutral sampling, for tests to change.

import type { SubmitRequest } from "../../sidecar/protocol.ts";

type Changes = Partial<Omit<SubmitRequest, "sampling">> & { sampling?: Partial<SubmitRequest["sampling"]> };

export function submitRequest({ sampling = {}, ...changes }: Changes = {}): SubmitRequest {
  return {
    salt: new Uint8Array(32),
    conversation: null,
    model: "tiny",
    messages: [{ role: "user", content: "hi" }],
    deadlineMs: 60_000,
    truncation: "auto",
    cacheTtlS: null,
    priority: 0,
    ...changes,
    sampling: {
      temperature: 1, topP: 1, topK: 0, minP: 0, seed: 1, frequencyPenalty: 0, presencePenalty: 0,
      repetitionPenalty: 1, logitBias: [], logprobs: null, n: 1, stop: [], maxTokens: null,
      ignoreEos: false, ...sampling,
    },
  };
}
