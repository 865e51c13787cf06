"""Where the time of steps goes, from what kernel-trace.cpp wrote. A step begins with its embedding; steps of one kind and
number of rows are put together (the median of the last eleven). Per kernel: its own time, what it adds behind the end of
the kernel before, and the gap between the two (below zero: it began early). usage: kernel-trace.py FILE [decode1 ...]"""

import collections
import statistics
import sys

KNOWN = ["skinny_kernel", "decode_kernel", "append_kv", "norm", "activation", "gather_kernel", "prefill_kernel", "combine",
         "embed", "measure", "choose", "quantise", "spread_step", "splitKreduce"]
STEPS = 11


def short_name(name):
    return next((known for known in KNOWN if known in name), name[:44])


def read_steps(path):
    kernels = []
    with open(path) as file:
        for line in file:
            begin, end, grid, shared, name = line.rstrip("\n").split(" ", 4)
            kernels.append((int(begin), int(end), int(grid), int(shared), name))
    kernels.sort()
    steps = []
    for kernel in kernels:
        if "embed_kernel" in kernel[4]:
            steps.append([])
        if steps:
            steps[-1].append(kernel)
    return steps


def kind_of(step):
    """The embedding has a block a row."""
    is_prefill = any("prefill_kernel" in kernel[4] for kernel in step)
    return ("prefill" if is_prefill else "decode") + str(step[0][2])


def describe(kind, steps):
    length = collections.Counter(map(len, steps)).most_common(1)[0][0]
    steps = [step for step in steps if len(step) == length][-STEPS:]
    rows = collections.OrderedDict()
    for i in range(length):
        own = statistics.median(step[i][1] - step[i][0] for step in steps)
        before = [step[i - 1][1] if i > 0 else step[0][0] for step in steps]
        added = statistics.median(step[i][1] - end for step, end in zip(steps, before))
        gap = statistics.median(step[i][0] - end for step, end in zip(steps, before))
        _, _, grid, shared, name = steps[0][i]
        row = rows.setdefault((short_name(name), grid, shared), [0, 0, 0, 0])
        for at, value in enumerate((1, own, added, gap)):
            row[at] += value
    whole = statistics.median(step[-1][1] - step[0][0] for step in steps)
    print(f"{kind}: {length} kernels, {whole / 1000:.0f} us (median of {len(steps)} steps)")
    for (name, grid, shared), (count, own, added, gap) in rows.items():
        print(f"{count:5d} x own {own / count / 1000:8.2f} us  adds {added / count / 1000:8.2f}  gap {gap / count / 1000:8.2f}"
              f"  in all {added / 1000:9.1f}  grid {grid:6d}  shared {shared:7d}  {name}")


kinds = collections.defaultdict(list)
for step in read_steps(sys.argv[1]):
    kinds[kind_of(step)].append(step)
for kind, steps in kinds.items():
    if kind in sys.argv[2:] or (len(sys.argv) == 2 and len(steps) >= STEPS):
        describe(kind, steps)
