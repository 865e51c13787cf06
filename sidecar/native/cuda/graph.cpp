// Captured graphs: kvs_graph_begin, kvs_graph_end, kvs_graph_launch. Kernels read the step at fixed addresses and the
// grids depend on the row count alone, so a graph serves every decode step of its size.

#include "device.h"

using kvs::check_cuda;
using kvs::require;
using kvs::with_device;

namespace {

void require_decode(const kvs_device& device, const char* call) {
  require(device.facts.row_count > 0, "%s: no step has begun", call);
  require(device.facts.is_decode, "%s: graphs are for steps whose every sequence has one row", call);
}

cudaGraphExec_t instantiate(cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(error, "cudaGraphInstantiate");
  return executable;
}

}  // namespace

extern "C" {

kvs_status kvs_graph_begin(kvs_device* device, uint32_t key) {
  return with_device(device, [&](kvs_device& d) {
    d.require_no_capture("kvs_graph_begin");
    require(d.graphs.count(key) == 0, "graph %u exists already", key);
    require_decode(d, "kvs_graph_begin");
    // Products of new shapes are timed during the capture: nothing else should run then. Once per size of step.
    d.drain_compute();
    check_cuda(cudaStreamBeginCapture(d.compute_stream(), cudaStreamCaptureModeRelaxed),
               "cudaStreamBeginCapture");
    d.capture_key = key;
  });
}

kvs_status kvs_graph_end(kvs_device* device, uint32_t key) {
  return with_device(device, [&](kvs_device& d) {
    require(d.capture_key == key, "graph %u is not being captured", key);
    d.capture_key.reset();
    const kvs::Graph graph{instantiate(d.compute_stream()), d.facts.row_count, d.facts.logit_count};
    d.graphs.emplace(key, graph);
    check_cuda(cudaGraphLaunch(graph.executable, d.compute_stream()), "cudaGraphLaunch");
  });
}

kvs_status kvs_graph_launch(kvs_device* device, uint32_t key) {
  return with_device(device, [&](kvs_device& d) {
    d.require_no_capture("kvs_graph_launch");
    const auto found = d.graphs.find(key);
    require(found != d.graphs.end(), "no graph %u", key);
    require_decode(d, "kvs_graph_launch");
    const kvs::Graph& graph = found->second;
    require(graph.row_count == d.facts.row_count && graph.logit_count == d.facts.logit_count,
            "graph %u has %u rows and %u logit rows, the step that has begun %u and %u", key, graph.row_count,
            graph.logit_count, d.facts.row_count, d.facts.logit_count);
    check_cuda(cudaGraphLaunch(graph.executable, d.compute_stream()), "cudaGraphLaunch");
  });
}

}  // extern "C"
