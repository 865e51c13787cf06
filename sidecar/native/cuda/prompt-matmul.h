// Gate and up of a prompt on Hopper, bound by the tensor cores: gated (rows, outputs / 2) = silu(g) * u, where g and u
// are the halves of x (rows, inputs) weight^T + bias. The gate takes no kernel and no memory of its own.

#pragma once

#include "skinny-matmul.h"

namespace kvs {

/** How many thread blocks share each tile of W; a bench tries all. */
enum class PromptCluster { fastest = 0, one = 1, two = 2 };

/** Whether the kernel serves these types and sizes: 16 bits, a gate of what is not added to y, all 16-byte aligned,
 * outputs a multiple of 16, inputs of 8. */
bool prompt_matmul_supports(const SkinnyProduct& product, const SkinnyDevice& device);
/** The share of the multiprocessors' time that goes into products within the matrix: low with few tiles. */
double prompt_matmul_use(const SkinnyProduct& product, const SkinnyDevice& device,
                         PromptCluster cluster = PromptCluster::fastest);
/** Enqueues; returns the launch's error. Sums in F32, in an order that the sizes alone decide. */
cudaError_t prompt_matmul(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream,
                          PromptCluster cluster = PromptCluster::fastest);

}  // namespace kvs
