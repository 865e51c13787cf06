// Every operation of the CUDA library against the CPU library, through the C ABI, with fresh random inputs.
// usage: kernel-check libkvasir_cpu.so libkvasir_cuda.so [--seed N] [--small] [group ...]

#include <cstring>
#include <set>

#include "checks.h"

int main(int argc, char** argv) {
  if (argc < 3) {
    std::printf("usage: kernel-check libkvasir_cpu.so libkvasir_cuda.so [--seed N] [--small] [group ...]\n");
    return 2;
  }
  uint64_t seed = std::random_device{}();
  bool is_small = false;
  std::set<std::string> groups;
  for (int i = 3; i < argc; ++i) {
    if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--small") == 0) {
      is_small = true;
    } else {
      groups.insert(argv[i]);
    }
  }
  std::printf("SEED=%llu\n", static_cast<unsigned long long>(seed));
  const check::Library cpu(argv[1]);
  const check::Library cuda(argv[2]);
  check::Report report;
  check::Random random(seed);
  check::Context context{cpu, cuda, report, random, is_small};
  const std::pair<const char*, void (*)(check::Context&)> all[] = {
      {"streams", check::check_streams}, {"refusals", check::check_refusals},   {"rows", check::check_rows},
      {"matmul", check::check_matmul},   {"chains", check::check_chains},       {"attention", check::check_attention},
      {"sampling", check::check_sampling},
  };
  for (const auto& [name, run] : all) {
    if (!groups.empty() && groups.count(name) == 0) continue;
    std::printf("-- %s\n", name);
    std::fflush(stdout);
    try {
      run(context);
    } catch (const std::exception& error) {
      report.threw(name, "", error.what());
    }
  }
  return report.finish() == 0 ? 0 : 1;
}
