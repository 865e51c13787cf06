/* The C ABI between the TypeScript engine and the compute libraries (libkvasir_cpu, libkvasir_cuda).
 *
 * Rules. C11: fixed-width integers, floats, pointers; no callbacks. Every function returns a
 * kvs_status unless it says otherwise; the reason of a failure is kvs_last_error() of that thread.
 * Every operation names its stream by its section and returns at once; only kvs_wait, the start-up
 * calls ("blocking") and kvs_close wait. Memory passed by pointer is read before the call returns,
 * except memory from kvs_alloc_host, which the caller leaves alone until an event recorded after the
 * call is done. A full queue answers KVS_BUSY and changes nothing. Sizes are element counts unless
 * named _bytes. Device memory is a uint64_t address; address + offset is valid inside an allocation.
 *
 * Threads: one thread drives a device (the engine's); kvs_post may be called from any.
 *
 * Shapes are row-major. "compute" is the activation type of the device (F32 on the CPU library;
 * F32, BF16 or F16 on CUDA). Logits, norm weights and biases are always F32, and so is the residual
 * stream: what embed writes, norms read, products are added to and logit rows are gathered from. */
#ifndef KVASIR_H
#define KVASIR_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVS_ABI_VERSION 1u

typedef int32_t kvs_status;
enum {
  KVS_OK = 0,
  KVS_BUSY = 1,    /* a queue is full: nothing changed, try again after an event */
  KVS_PENDING = 2, /* the event is not done yet */
  KVS_TIMEOUT = 3, /* kvs_wait: nothing happened in time */
  KVS_INVALID = -1,
  KVS_OUT_OF_MEMORY = -2,
  KVS_UNSUPPORTED = -3, /* this library, GPU, kernel or file system cannot do it */
  KVS_IO = -4,
  KVS_DEVICE_FAILED = -5, /* the device is lost; close it */
  KVS_NO_SPACE = -6,
  KVS_IN_USE = -7 /* another process holds the lock */
};

typedef uint32_t kvs_dtype;
enum { KVS_F32 = 0, KVS_F16 = 1, KVS_BF16 = 2, KVS_F8E4M3 = 3 };

typedef uint32_t kvs_stream;
enum { KVS_STREAM_COMPUTE = 0, KVS_STREAM_LOAD = 1, KVS_STREAM_SAVE = 2 };

typedef struct kvs_device kvs_device;
typedef struct kvs_weight kvs_weight; /* a (rows, cols) matrix in the library's own layout */
typedef struct kvs_disk kvs_disk;

uint32_t kvs_abi_version(void);
/* Text of this thread's last failure; never NULL, valid until its next call. */
const char *kvs_last_error(void);

/* ---- device (blocking) ------------------------------------------------------------------- */

enum { KVS_ISA_BEST = 0, KVS_ISA_AVX512 = 1, KVS_ISA_AVX2 = 2, KVS_ISA_PORTABLE = 3 };

/* Everything that is fixed for the life of the device. All fields are 4 bytes. */
typedef struct {
  uint32_t struct_bytes; /* sizeof(kvs_device_config) */
  uint32_t layers;
  uint32_t hidden_size;
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t rotary_dim; /* leading dims of a head that RoPE turns, pairs (i, i + rotary_dim / 2); 0: none */
  uint32_t vocab_size;
  uint32_t block_tokens;    /* power of two, 8 to 256 */
  uint32_t max_positions;   /* longest view, in tokens */
  uint32_t max_rows;        /* most tokens in one step */
  uint32_t max_sequences;   /* token slots, and most sequences in one step */
  kvs_dtype compute_dtype;
  kvs_dtype kv_dtype;
  float attention_scale;    /* multiplies q . k, usually 1 / sqrt(head_dim) */
  uint32_t thread_count;    /* CPU compute threads; 0: cores - 1, at least 1 */
  uint32_t isa;             /* CPU only, KVS_ISA_*; for tests */
  uint32_t gpu_index;       /* CUDA only */
} kvs_device_config;

kvs_status kvs_open(const kvs_device_config *config, kvs_device **out);
/* Joins every thread, frees everything. Handles of this device die with it. */
kvs_status kvs_close(kvs_device *device);
/* JSON object, NUL-terminated, cut at capacity_bytes: backend, name, isa, threads, numeric_mode, memory_bytes ...; on
 * CUDA also fp8_scales: "inside" products or "after" them, "none" while there is no F8E4M3 matrix; numa_node: the
 * GPU's, of which new pages of the host arena are asked for where the system lets a thread ask, -1: of none. */
kvs_status kvs_device_info(kvs_device *device, char *json, uint32_t capacity_bytes);
/* Bytes of device memory: free now, and in total. */
kvs_status kvs_memory_info(kvs_device *device, uint64_t *free_bytes, uint64_t *total_bytes);

/* RoPE: angle of pair i at position p is p * inverse_frequencies[i]; (rotary_dim / 2) doubles. */
kvs_status kvs_set_rope(kvs_device *device, const double *inverse_frequencies);
/* ALiBi: slopes[head] * (key position - query position) is added to the scaled score; (heads) floats. */
kvs_status kvs_set_alibi(kvs_device *device, const float *slopes);

kvs_status kvs_alloc(kvs_device *device, uint64_t bytes, uint64_t *address);
kvs_status kvs_free(kvs_device *device, uint64_t address);
/* Host memory that streams can read and write without a copy (pinned). 4096-byte aligned. */
kvs_status kvs_alloc_host(kvs_device *device, uint64_t bytes, uint64_t *address);
kvs_status kvs_free_host(kvs_device *device, uint64_t address);

/* A weight matrix (rows = outputs, cols = inputs), stored as dtype. Rows may arrive in any order and number;
 * source is (row_count, cols) of source_dtype (F32, F16, BF16), converted if the types differ. F8E4M3 has a scale a
 * row, made from its largest magnitude; it takes F16 or BF16 activations and a GPU of compute capability 8.9 or newer,
 * rows and cols that are multiples of 16, and is KVS_UNSUPPORTED elsewhere. */
kvs_status kvs_weight_create(kvs_device *device, uint32_t rows, uint32_t cols, kvs_dtype dtype, kvs_weight **out);
kvs_status kvs_weight_upload(kvs_device *device, kvs_weight *weight, uint32_t row_begin, uint32_t row_count,
                             const void *source, kvs_dtype source_dtype);
/* Uniform in +-sqrt(3) * deviation, from the seed and the element's index: the same values in both libraries. */
kvs_status kvs_weight_fill_random(kvs_device *device, kvs_weight *weight, uint64_t seed, float deviation);
kvs_status kvs_weight_free(kvs_device *device, kvs_weight *weight);

/* ---- events and waiting ---------------------------------------------------------------------- */

kvs_status kvs_event_create(kvs_device *device, uint32_t *event);
/* The event becomes pending and is done when the stream gets there. watch: its end wakes kvs_wait. */
kvs_status kvs_record(kvs_device *device, kvs_stream stream, uint32_t event, uint32_t watch);
kvs_status kvs_stream_wait(kvs_device *device, kvs_stream stream, uint32_t event);
/* KVS_OK: done (or never recorded). KVS_PENDING. Negative: what it waited for has failed. */
kvs_status kvs_event_query(kvs_device *device, uint32_t event);
/* Blocks until a watched event ended or kvs_post was called since the last return, or KVS_TIMEOUT. */
kvs_status kvs_wait(kvs_device *device, uint32_t timeout_us);
/* Wakes kvs_wait. Any thread. */
kvs_status kvs_post(kvs_device *device);

/* ---- a step's input (compute stream) ---------------------------------------------------------- */

/* One step: row_count tokens of sequence_count sequences. An int32 array in memory of kvs_alloc_host:
 * this header, then the arrays at the offsets it gives (in int32s from the header's start).
 * Token ids live in a device buffer tokens[slot][position], filled by kvs_write_tokens and by kvs_sample. */
typedef struct {
  int32_t row_count;
  int32_t sequence_count;
  int32_t logit_count;
  int32_t sequences_at;    /* kvs_step_sequence[sequence_count] */
  int32_t row_sequence_at; /* int32[row_count]: index of its sequence; -1: padding, computes garbage, stores nothing */
  int32_t row_position_at; /* int32[row_count]: position in the sequence's view */
  int32_t block_table_at;  /* int32[]: gpu block of each block_tokens positions; -1: outside a sliding window, unread */
  int32_t logit_row_at;    /* int32[logit_count]: row whose logits are wanted */
  int32_t sampling_at;     /* kvs_step_sampling[logit_count] */
  int32_t bias_id_at;      /* int32[]: token ids of logit biases */
  int32_t bias_value_at;   /* float[] */
  int32_t reserved;
} kvs_step_header;

typedef struct {
  int32_t slot;        /* row of the tokens buffer */
  int32_t row_begin;   /* its rows are neighbours, positions rising by one */
  int32_t row_count;
  int32_t table_begin; /* its block table; entry j holds positions [j * block_tokens, (j + 1) * block_tokens) */
} kvs_step_sequence;

/* Order: penalties (repetition, then frequency and presence) and bias on the logits; / temperature; top_k; top_p over
 * the rest renormalised; min_p (relative to the likeliest); then inverse CDF in order of token id with a uniform drawn
 * from Philox4x32-10 keyed by seed, counter = rng_position. temperature 0: arg max, lowest id on ties; top_k and top_p
 * keep the lowest ids of equals, too. Logprobs are of the unchanged logits. */
typedef struct {
  int32_t sequence; /* index in sequences; -1: padding, writes nothing */
  float temperature;
  int32_t top_k; /* 0: off */
  float top_p;   /* 1: off */
  float min_p;   /* 0: off */
  float frequency_penalty; /* over tokens [prompt_length, position] */
  float presence_penalty;
  float repetition_penalty; /* over tokens [0, position]; 1: off */
  int32_t prompt_length;
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t rng_position;
  int32_t bias_begin;
  int32_t bias_count;
  int32_t top_logprobs; /* -1: no logprobs; 0 to 20: so many rivals */
  int32_t sampled;      /* 1: choose a token; 0: only logits are wanted */
} kvs_step_sampling;

/* What kvs_sample writes, one per logit row, into memory of kvs_alloc_host. */
typedef struct {
  int32_t token;   /* -1: the logits held NaN or +inf, or no finite value (tokens[] gets 0), or none was wanted */
  float logprob;
  int32_t top_count;
  int32_t reserved;
  int32_t top_ids[20];
  float top_logprobs[20];
} kvs_sample_result;

/* tokens[slot][position ...] = ids. Ordered on the compute stream; ids are read before the return. */
kvs_status kvs_write_tokens(kvs_device *device, uint32_t slot, uint32_t position, const int32_t *ids, uint32_t count);
/* Makes `step` (kvs_alloc_host memory, `bytes` long) the input of the operations that follow. */
kvs_status kvs_begin_step(kvs_device *device, const int32_t *step, uint32_t bytes);

/* ---- operations (compute stream) ------------------------------------------------------------- */

/* y (row_count, hidden) F32 = weight[token of the row]. */
kvs_status kvs_embed(kvs_device *device, uint64_t y, kvs_weight *weight, uint32_t row_count);
/* y (row_count, size) compute = x / sqrt(mean(x^2) + epsilon) * weight; x F32, not overlapped by y. */
kvs_status kvs_rms_norm(kvs_device *device, uint64_t y, uint64_t x, uint64_t weight, uint32_t row_count, uint32_t size,
                        float epsilon);
/* y = (x - mean) / sqrt(variance + epsilon) * weight + bias (bias may be 0); y and x likewise. */
kvs_status kvs_layer_norm(kvs_device *device, uint64_t y, uint64_t x, uint64_t weight, uint64_t bias,
                          uint32_t row_count, uint32_t size, float epsilon);

enum {
  KVS_MATMUL_ACCUMULATE = 1, /* y is F32, and y += instead of y = (the residual add) */
  KVS_MATMUL_F32_OUT = 2     /* y is F32 whatever the compute type (logits) */
};
/* y (row_count, weight rows) = x (row_count, weight cols) weight^T + bias. bias (weight rows) F32 or 0. y does not
 * overlap x or bias. */
kvs_status kvs_matmul(kvs_device *device, uint64_t y, uint64_t x, kvs_weight *weight, uint64_t bias, uint32_t row_count,
                      uint32_t flags);
/* qkv (row_count, (heads + 2 kv_heads) head_dim): per head q and k are RMS-normed when q_norm / k_norm (head_dim) are
 * not 0; k is turned by its offset in its block and stored with v in the row's block, as kv_dtype; q, not turned,
 * goes to q (row_count, heads * head_dim). */
kvs_status kvs_append_kv(kvs_device *device, uint64_t q, uint64_t qkv, uint32_t layer, uint64_t q_norm, uint64_t k_norm,
                         uint32_t row_count, float epsilon);
/* y (row_count, heads * head_dim) = softmax(scale (R(p - base) q) . k) v over positions (p - window, p] of the row's
 * view; R(p - base): q of position p turned against the base position of each block. window 0: all. */
kvs_status kvs_attention(kvs_device *device, uint64_t y, uint64_t q, uint32_t layer, uint32_t window,
                         uint32_t row_count);
/* y (row_count, size) = silu(x[:, :size]) * x[:, size:]; x (row_count, 2 size) holds nothing of use afterwards. */
kvs_status kvs_silu_mul(kvs_device *device, uint64_t y, uint64_t x, uint32_t row_count, uint32_t size);
/* y = gelu(x), exact (erf). y may be x. */
kvs_status kvs_gelu(kvs_device *device, uint64_t y, uint64_t x, uint32_t row_count, uint32_t size);
/* y (logit_count, size) F32 = the rows of x (row_count, size) F32 that the step wants logits of. */
kvs_status kvs_gather_logit_rows(kvs_device *device, uint64_t y, uint64_t x, uint32_t logit_count, uint32_t size);
/* logits (logit_count, vocab_size) F32 -> results (kvs_sample_result[logit_count], kvs_alloc_host memory); the chosen
 * token is also written to tokens[slot][position + 1]. Logits may be overwritten. */
kvs_status kvs_sample(kvs_device *device, uint64_t logits, uint64_t results, uint32_t logit_count);
/* Device memory to kvs_alloc_host memory, in stream order. */
kvs_status kvs_copy_out(kvs_device *device, uint64_t destination, uint64_t source, uint64_t bytes);
/* Host memory (read before return) to device memory, in stream order. For norm weights, biases, tests. */
kvs_status kvs_copy_in(kvs_device *device, uint64_t destination, const void *source, uint64_t bytes);

/* Captures the operations between begin and end as graph `key` (and runs them once); kvs_graph_launch repeats
 * them on the step input of that moment. KVS_UNSUPPORTED: call the operations every time. */
kvs_status kvs_graph_begin(kvs_device *device, uint32_t key);
kvs_status kvs_graph_end(kvs_device *device, uint32_t key);
kvs_status kvs_graph_launch(kvs_device *device, uint32_t key);

/* ---- KV blocks ------------------------------------------------------------------------------- */

/* A block is block_tokens tokens of all layers, [layer][K|V][kv head][token][head_dim] of kv_dtype: the same bytes in
 * every tier. Slots in host memory and on disk are block bytes rounded up to 4096 apart. */
kvs_status kvs_kv_create(kvs_device *device, uint32_t block_count);
kvs_status kvs_block_bytes(kvs_device *device, uint64_t *block_bytes, uint64_t *slot_bytes);
/* Whole blocks, compute stream. */
kvs_status kvs_copy_blocks(kvs_device *device, const int32_t *sources, const int32_t *destinations, uint32_t count);
/* One layer of many blocks; load stream: host slots -> gpu blocks; save stream: gpu blocks -> host slots. `event` is
 * recorded (watched) behind the copies. A save does not wait for the compute stream by itself: use kvs_stream_wait. */
kvs_status kvs_load_layer(kvs_device *device, uint32_t layer, const int32_t *host_slots, const int32_t *blocks,
                          uint32_t count, uint32_t event);
kvs_status kvs_save_layer(kvs_device *device, uint32_t layer, const int32_t *blocks, const int32_t *host_slots,
                          uint32_t count, uint32_t event);

/* The host tier: one mapping of slot_count slots and as many 4096-byte headers (which the caller reads and writes).
 * name: a POSIX shared-memory name ("/kvasir-...") that survives the process, or NULL for anonymous memory. */
typedef struct {
  uint64_t slots_address;
  uint64_t headers_address;
  uint32_t is_shared;  /* 1: lives in the named mapping; 0: anonymous, dies with the process */
  uint32_t is_adopted; /* 1: the mapping existed with this very size; its headers may be believed after checks */
} kvs_host_arena;
kvs_status kvs_host_arena_open(kvs_device *device, const char *name, uint32_t slot_count, kvs_host_arena *out);
/* unlink: remove the name, so that nothing survives. */
kvs_status kvs_host_arena_close(kvs_device *device, uint32_t unlink);

/* ---- disk (not a stream: requests and completions) ---------------------------------------------- */

/* KVS_DISK_SYNC: what was completed before it was submitted survives a power failure; only its tag counts. */
enum { KVS_DISK_READ = 0, KVS_DISK_WRITE = 1, KVS_DISK_SYNC = 2 };
typedef struct {
  uint64_t tag;
  uint64_t offset_bytes; /* multiple of 4096 */
  uint64_t address;      /* 4096-byte aligned host memory; left alone until the completion */
  uint32_t bytes;        /* multiple of 4096 */
  uint32_t operation;
} kvs_disk_request;

typedef struct {
  uint64_t tag;
  uint64_t checksum; /* kvs_checksum of the bytes read or written, computed by the I/O thread */
  uint32_t elapsed_us;
  kvs_status status; /* KVS_OK, KVS_IO (also a short read or write), KVS_NO_SPACE */
} kvs_disk_completion;

typedef struct {
  uint32_t is_direct;       /* O_DIRECT in force */
  uint32_t is_preallocated; /* 0: the file system refused; the file grows up to its size */
  uint32_t is_new;          /* the file was created, or empty */
  uint32_t thread_count;
} kvs_disk_info;

/* Opens (or makes) one file, locks it (KVS_IN_USE), makes it mode 0600, file_bytes long and preallocated. A file of
 * another length keeps what fits; new bytes are zeros. */
kvs_status kvs_disk_open(const char *path, uint64_t file_bytes, uint32_t thread_count, kvs_disk **out,
                         kvs_disk_info *info);
/* Takes as many requests as the queue holds, in order; *accepted says how many (KVS_BUSY when fewer than count).
 * Reads overtake writes, and half of the threads take no writes. */
kvs_status kvs_disk_submit(kvs_disk *disk, const kvs_disk_request *requests, uint32_t count, uint32_t *accepted);
kvs_status kvs_disk_reap(kvs_disk *disk, kvs_disk_completion *completions, uint32_t capacity, uint32_t *count);
/* Completions wake kvs_wait of this device (NULL: none). */
kvs_status kvs_disk_wake(kvs_disk *disk, kvs_device *device);
/* Blocking, for start-up, of any alignment; a write is durable when the call returns. */
kvs_status kvs_disk_read_now(kvs_disk *disk, uint64_t offset_bytes, void *destination, uint64_t bytes);
kvs_status kvs_disk_write_now(kvs_disk *disk, uint64_t offset_bytes, const void *source, uint64_t bytes);
/* The file becomes all zeros, and preallocated again. Blocking; nothing may be in flight (KVS_INVALID). */
kvs_status kvs_disk_discard(kvs_disk *disk);
/* Waits for what is in flight, at most timeout_us, then closes. */
kvs_status kvs_disk_close(kvs_disk *disk, uint32_t timeout_us);

/* ---- files ---------------------------------------------------------------------------------------- */

/* Advice that these bytes of an open file will be read soon. Sends for them, does not wait until they are there, and
 * cannot fail. */
void kvs_read_ahead(int32_t file, uint64_t offset_bytes, uint64_t bytes);

/* 64-bit checksum (XXH3-class quality is not needed: it guards against rot and torn writes, not attackers). */
uint64_t kvs_checksum(const void *data, uint64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
