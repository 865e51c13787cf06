// The wire between edge and sidecar: one WebSocket per edge process, msgpack arrays, many streams.
// A frame is [type, ...fields]. Both sides parse every frame here before they believe it; a frame
// that does not parse is answered by closing the connection (code 4400, with the reason).
// The secret travels in the upgrade request (`Authorization: Bearer`), never in a frame.

import { Packr } from "msgpackr";
import { z } from "zod";

/** Raised whenever a frame's meaning changes; both sides must speak the same one. */
export const PROTOCOL_VERSION = 2;

/** Longest frame either side accepts, in bytes. A submit holds a whole conversation as text. */
export const FRAME_BYTES_MAX = 32 * 1024 * 1024;

/** WebSocket close codes. 4400..4499: the peer's fault, 4500..: ours. */
export const CloseCode = {
  malformedFrame: 4400,
  wrongSecret: 4401,
  outOfOrder: 4409,
  wrongVersion: 4426,
  tooSlow: 4408,
  shuttingDown: 4503,
} as const;

/** First field of each frame. */
export const FrameType = {
  hello: 0,
  submit: 1,
  abort: 2,
  delta: 3,
  done: 4,
  error: 5,
  statsRequest: 6,
  stats: 7,
  ping: 8,
  pong: 9,
  forget: 10,
  forgotten: 11,
} as const;

/** Why a choice ended. */
export type FinishReason = "stop" | "length" | "abort";

/** Codes of error frames; `edge/errors.ts` maps each to an HTTP status. */
export const ERROR_CODES = [
  "invalid_request",
  "context_length_exceeded",
  "conversation_deleted",
  "queue_full",
  "deadline_exceeded",
  "shutting_down",
  "internal",
] as const;
export type ErrorCode = (typeof ERROR_CODES)[number];

/** Schema of the fields after the type, by frame type. */
type Schemas = Record<number, z.ZodType>;

// ---- edge -> sidecar -------------------------------------------------------------------------

const streamId = z.int().min(1).max(0xffffffff);

/** One message of the conversation; `content` is plain text. */
const message = z.object({
  role: z.enum(["system", "developer", "user", "assistant", "tool"]),
  content: z.string(),
  name: z.string().optional(),
});
export type ChatMessage = z.infer<typeof message>;

/** Sampling of one request. Neutral values switch a thing off: topK 0, topP 1, minP 0, penalties 0 (repetition 1). */
const sampling = z.object({
  temperature: z.number().min(0).max(2),
  topP: z.number().gt(0).max(1),
  topK: z.int().min(0),
  minP: z.number().min(0).max(1),
  /** Same seed, same model and prompt: same text. 53 bits; drawn by the edge when the client gave none. */
  seed: z.int().min(0),
  frequencyPenalty: z.number().min(-2).max(2),
  presencePenalty: z.number().min(-2).max(2),
  repetitionPenalty: z.number().gt(0).max(10),
  /** [token id, bias added to the logit] */
  logitBias: z.array(z.tuple([z.int().min(0), z.number().min(-100).max(100)])).max(1024),
  /** null: none. n: the logprob of the chosen token and of the n most likely ones (0..20). */
  logprobs: z.int().min(0).max(20).nullable(),
  /** Number of choices. */
  n: z.int().min(1).max(16),
  stop: z.array(z.string().min(1).max(512)).max(16),
  /** null: until the model stops or its context is full. */
  maxTokens: z.int().min(1).nullable(),
  ignoreEos: z.boolean(),
});
export type SamplingParams = z.infer<typeof sampling>;

const submit = z.object({
  /** Account's random salt, 32 bytes: root of its block ids (design 3.3). */
  salt: z.instanceof(Uint8Array).refine((salt) => salt.length === 32, "salt must be 32 bytes"),
  /** Conversation id, or null when the messages alone decide. */
  conversation: z.string().min(1).max(64).nullable(),
  model: z.string(),
  messages: z.array(message).min(1),
  sampling,
  /** The sidecar gives up this many ms after it received the request. */
  deadlineMs: z.int().min(1),
  /** What to do when the prompt does not fit the window: drop old blocks, or refuse. */
  truncation: z.enum(["auto", "disabled"]),
  /** Seconds of idleness after which this conversation's blocks may go; null: the sidecar's default. */
  cacheTtlS: z.int().min(0).nullable(),
  /** Soft wish to keep this conversation's blocks longer (above 0) or less long (below) than others'. */
  priority: z.int().min(-10).max(10),
});
export type SubmitRequest = z.infer<typeof submit>;

/** Fields of each frame type that an edge may send. */
const edgeFrames: Schemas = {
  [FrameType.hello]: z.tuple([z.int(), z.string().max(128)]),
  [FrameType.submit]: z.tuple([streamId, submit]),
  [FrameType.abort]: z.tuple([streamId]),
  [FrameType.statsRequest]: z.tuple([streamId]),
  [FrameType.ping]: z.tuple([z.int()]),
  [FrameType.forget]: z.tuple([streamId, z.instanceof(Uint8Array), z.string()]),
};

/** What an edge may say, as [type, ...fields]. */
export type EdgeFrame =
  | [type: typeof FrameType.hello, version: number, edgeName: string]
  | [type: typeof FrameType.submit, stream: number, request: SubmitRequest]
  | [type: typeof FrameType.abort, stream: number]
  | [type: typeof FrameType.statsRequest, stream: number]
  | [type: typeof FrameType.ping, nonce: number]
  | [type: typeof FrameType.forget, stream: number, salt: Uint8Array, conversation: string];

// ---- sidecar -> edge -------------------------------------------------------------------------

/** What the sidecar serves, sent in its hello. */
const modelInfo = z.object({
  id: z.string(),
  maxModelLen: z.int(),
  vocabSize: z.int(),
  blockTokens: z.int(),
  backend: z.string(),
  /** Unix seconds: when the model was loaded. */
  created: z.int(),
});
export type ModelInfo = z.infer<typeof modelInfo>;

/** One token's log probability and its most likely rivals, as text and bytes. */
const tokenLogprob = z.object({
  token: z.string(),
  bytes: z.array(z.int()),
  logprob: z.number(),
  top: z.array(z.object({ token: z.string(), bytes: z.array(z.int()), logprob: z.number() })),
});
export type TokenLogprob = z.infer<typeof tokenLogprob>;

/**
 * [stream, choice index, text, tokens this stands for, logprobs of those tokens or null]. Text may be "" while a
 * character is incomplete.
 */
const delta = z.tuple([z.int(), z.int(), z.string(), z.int(), z.array(tokenLogprob).nullable()]);
export type Delta = z.infer<typeof delta>;

/** Tokens by where they came from. cached = gpu + host + disk; prompt includes cached. */
const usage = z.object({
  promptTokens: z.int(),
  completionTokens: z.int(),
  cachedTokens: z.object({ gpu: z.int(), host: z.int(), disk: z.int() }),
});
export type Usage = z.infer<typeof usage>;

/** Milliseconds. ttftMs counts from the sidecar's receipt of the submit. */
const timings = z.object({
  queueMs: z.number(),
  loadMs: z.number(),
  prefillMs: z.number(),
  ttftMs: z.number(),
  totalMs: z.number(),
});
export type Timings = z.infer<typeof timings>;

/** What was done about the part of the prompt that was cached, and what had been expected of it. */
export const CACHE_CHOICES = ["none", "resident", "load", "split", "recompute"] as const;
const cacheReport = z.object({
  /**
   * none: nothing was cached; resident: all of it lay in gpu memory; load: from host or disk; split: a part
   * loaded, the rest computed anew; recompute: all of it computed anew, because that was faster.
   */
  choice: z.enum(CACHE_CHOICES),
  /** Expected time of loading, and of computing the same tokens; null where there was nothing to load. */
  predictedLoadMs: z.number().nullable(),
  predictedRecomputeMs: z.number().nullable(),
  loadedBytes: z.int(),
  /** Tokens that had left the view by the end of the answer, because the context window was full. */
  droppedTokens: z.int(),
  /** Blocks of a view that had dropped tokens were lost, so it was computed afresh from what it still shows. */
  isViewRestarted: z.boolean(),
});
export type CacheReport = z.infer<typeof cacheReport>;

const done = z.object({
  usage,
  timings,
  cache: cacheReport,
  /** One per choice. */
  finishReasons: z.array(z.enum(["stop", "length", "abort"])),
  /** Sum of the tokens of all deltas of this stream, so that a cut is seen. */
  tokenCount: z.int(),
  /** Counted reasons for prompt tokens that were not served from cache, e.g. { absent: 12 }. */
  missReasons: z.record(z.string(), z.int()),
});
export type Done = z.infer<typeof done>;

/** Fields of each frame type that a sidecar may send. */
const sidecarFrames: Schemas = {
  [FrameType.hello]: z.tuple([z.int(), z.string(), modelInfo]),
  [FrameType.delta]: z.tuple([z.array(delta)]),
  [FrameType.done]: z.tuple([z.int(), done]),
  [FrameType.error]: z.tuple([z.int(), z.enum(ERROR_CODES), z.string(), z.number().nullable()]),
  [FrameType.stats]: z.tuple([z.int(), z.record(z.string(), z.unknown())]),
  [FrameType.pong]: z.tuple([z.int()]),
  [FrameType.forgotten]: z.tuple([z.int(), z.record(z.string(), z.int())]),
};

/**
 * What a sidecar may say, as [type, ...fields]. One delta frame carries an engine step's text for all streams of that
 * edge.
 */
export type SidecarFrame =
  | [type: typeof FrameType.hello, version: number, sidecarName: string, model: ModelInfo]
  | [type: typeof FrameType.delta, deltas: Delta[]]
  | [type: typeof FrameType.done, stream: number, done: Done]
  | [type: typeof FrameType.error, stream: number, code: ErrorCode, message: string, retryAfterS: number | null]
  | [type: typeof FrameType.stats, stream: number, stats: Record<string, unknown>]
  | [type: typeof FrameType.pong, nonce: number]
  | [type: typeof FrameType.forgotten, stream: number, blocksByTier: Record<string, number>];

// ---- codec -----------------------------------------------------------------------------------

/** A frame that is not msgpack, or not one of ours. The message is fit for a close reason. */
export class FrameError extends Error {
  override name = "FrameError";
}

const packr = new Packr({ useRecords: false, mapsAsObjects: true, int64AsType: "number" });

export function encodeFrame(frame: EdgeFrame | SidecarFrame): Uint8Array {
  return packr.pack(frame);
}

/** Throws FrameError. */
export function decodeEdgeFrame(bytes: Uint8Array): EdgeFrame {
  return parse(edgeFrames, bytes) as EdgeFrame;
}

/** Throws FrameError. */
export function decodeSidecarFrame(bytes: Uint8Array): SidecarFrame {
  return parse(sidecarFrames, bytes) as SidecarFrame;
}

function parse(schemas: Schemas, bytes: Uint8Array): unknown[] {
  let frame: unknown;
  try {
    frame = packr.unpack(bytes);
  } catch (error) {
    throw new FrameError(`not msgpack: ${(error as Error).message}`);
  }
  if (!Array.isArray(frame)) throw new FrameError("a frame must be an array");
  const [type, ...fields] = frame;
  const schema = typeof type === "number" ? schemas[type] : undefined;
  if (schema === undefined) throw new FrameError(`unknown frame type ${String(type)}`);
  const result = schema.safeParse(fields);
  if (!result.success) {
    const issue = result.error.issues[0]!;
    throw new FrameError(`frame type ${type}, field ${issue.path.join(".")}: ${issue.message}`);
  }
  return [type, ...(result.data as unknown[])];
}
