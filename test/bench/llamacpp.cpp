// llama.cpp on the same work as bench/cpu.ts: prefill and decode through llama.h, with a lasting thread pool, as its
// own server has. Linked to the prebuilt libraries of the npm package @node-llama-cpp/linux-x64. Prints JSON: for each
// piece of work, the milliseconds of its repeats.
//   llamacpp MODEL.gguf LIBRARIES THREADS REPEATS STEPS (prefill:TOKENS | decode:CONTEXT)...

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr int batch_tokens = 512;

volatile float sink;

/** Decodes tokens [from, from + count) and finds the likeliest next one. */
void feed(llama_context* context, int vocab_size, int from, int count) {
  std::vector<llama_token> ids(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) ids[static_cast<size_t>(i)] = ((from + i) * 7919 + 13) % vocab_size;
  for (int at = 0; at < count; at += batch_tokens) {
    const int size = std::min(batch_tokens, count - at);
    if (llama_decode(context, llama_batch_get_one(ids.data() + at, size)) != 0) std::exit(3);
  }
  const float* logits = llama_get_logits_ith(context, -1);
  sink = *std::max_element(logits, logits + vocab_size);
}

template <class Work>
double milliseconds_of(const Work& work) {
  const Clock::time_point begin = Clock::now();
  work();
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

void attach_threads(llama_context* context, int threads) {
  ggml_backend_reg_t cpu = ggml_backend_dev_backend_reg(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
  const auto make = reinterpret_cast<ggml_threadpool_t (*)(ggml_threadpool_params*)>(
      ggml_backend_reg_get_proc_address(cpu, "ggml_threadpool_new"));
  if (make == nullptr) return;
  ggml_threadpool_params parameters;
  ggml_threadpool_params_init(&parameters, threads);
  llama_attach_threadpool(context, make(&parameters), nullptr);
}

llama_context* open_context(const char* path, int threads) {
  llama_model_params model_parameters = llama_model_default_params();
  model_parameters.n_gpu_layers = 0;
  llama_model* model = llama_model_load_from_file(path, model_parameters);
  if (model == nullptr) return nullptr;
  llama_context_params parameters = llama_context_default_params();
  parameters.n_ctx = 2112;
  parameters.n_batch = parameters.n_ubatch = batch_tokens;
  parameters.n_threads = parameters.n_threads_batch = threads;
  parameters.no_perf = true;
  llama_context* context = llama_init_from_model(model, parameters);
  if (context != nullptr) attach_threads(context, threads);
  return context;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 7) return 1;
  const int threads = std::atoi(arguments[3]), repeats = std::atoi(arguments[4]), steps = std::atoi(arguments[5]);
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  ggml_backend_load_all_from_path(arguments[2]);
  llama_backend_init();
  llama_context* context = open_context(arguments[1], threads);
  if (context == nullptr) return 2;
  const int vocab_size = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context)));
  llama_memory_t memory = llama_get_memory(context);
  std::printf("{");
  for (int i = 6; i < count; ++i) {
    const std::string work = arguments[i];
    const bool is_prefill = work.rfind("prefill:", 0) == 0;
    const int tokens = std::atoi(work.substr(work.find(':') + 1).c_str());
    llama_memory_clear(memory, false);
    if (!is_prefill) feed(context, vocab_size, 0, tokens);
    std::printf("%s\"%s\": [", i > 6 ? ", " : "", work.c_str());
    for (int repeat = -1; repeat < repeats; ++repeat) {
      const double milliseconds = milliseconds_of([&] {
        if (is_prefill) return feed(context, vocab_size, 0, tokens);
        for (int step = 0; step < steps; ++step) feed(context, vocab_size, tokens + step, 1);
      });
      llama_memory_seq_rm(memory, 0, is_prefill ? 0 : tokens, -1);
      if (repeat >= 0) std::printf("%s%.4f", repeat > 0 ? ", " : "", milliseconds / (is_prefill ? 1 : steps));
    }
    std::printf("]");
  }
  std::printf("}\n");
  return 0;
}
