"""Rates of the Python stack's own kernels on this GPU, beside which the benches' rates stand: skinny products, causal
attention, a large copy, a large product. Prints medians of CUDA events over rotating inputs."""

import statistics
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def median_us(run, repeats=15):
    """Median time of run(i), i rising, in microseconds, of one call inside a graph of several."""
    for i in range(3):
        run(i)
    torch.cuda.synchronize()
    calls = 8
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i)
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def linear(rows, outputs, inputs):
    copies = max(2, min(8, int(800e6 / (outputs * inputs * 2))))
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    us = median_us(lambda i: F.linear(x, weights[i % copies]))
    print(f"F.linear rows {rows:3d} {outputs:6d} x {inputs:5d} {us:8.1f} us {outputs * inputs * 2 / us / 1e6:5.2f} TB/s")


def attention(length, heads, dim, backend):
    q, k, v = (torch.randn(1, heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with sdpa_kernel(backend):
        us = median_us(lambda i: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    print(f"sdpa {backend.name:16s} {length} x {heads} x {dim} {us:8.1f} us {2 * length * length * heads * dim / us / 1e6:6.1f} TFLOP/s")


print(torch.cuda.get_device_name(), torch.__version__)
a, b = (torch.randn(1 << 30, device="cuda") for _ in range(2))
us = median_us(lambda i: b.copy_(a))
print(f"copy {2 * a.numel() * 4 / us / 1e6:.2f} TB/s")
del a, b
x, w = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
us = median_us(lambda i: F.linear(x, w))
print(f"product 8192 {2 * 8192**3 / us / 1e6:.0f} TFLOP/s")
for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
    attention(4096, 40, 128, backend)
    attention(8192, 32, 128, backend)
    attention(4096, 32, 64, backend)
attention(4096, 16, 256, SDPBackend.FLASH_ATTENTION)
sizes = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (27648, 5120), (15360, 5120), (5120, 13824),
         (5120, 5120), (7168, 5120), (5120, 27648), (128256, 4096)]
for rows in (1, 4, 8, 16, 32, 64):
    for size in sizes:
        linear(rows, *size)
