"""The Python stack (PyTorch and transformers) on this GPU with models of real shape and made-up bf16 weights, beside
which the engine bench's numbers stand: prefill, new tokens behind a history, decode, and 64 conversations in the stack's
own batching. usage: peer-models.py [--shapes 8b,13b] [--parts steps,conversations] [--trace sharegpt.tsv.gz]
[--seconds-max N]"""

import argparse
import gzip
import statistics
import time
import torch
import transformers
from shapes import make_model
from transformers import DynamicCache, GenerationConfig

HISTORY = {"1b": [2048], "8b": [8192], "13b": [2048], "32b": [2048, 8192]}
BATCHES = {"1b": [1, 16, 64], "8b": [1, 16, 64], "13b": [1, 16], "32b": [1, 16]}


def tokens(model, batch, count):
    return torch.randint(10, model.config.vocab_size, (batch, count), device="cuda")


REST_S = 0.3  # as test/gpu/engine/raw-steps.ts


def median_ms(run, repeats=5, rest_s=0.0):
    times = []
    for i in range(repeats + 1):
        torch.cuda.synchronize()
        time.sleep(rest_s)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times[1:])


def note(shape, what, value, unit="ms"):
    print(f"{shape:5s} {what:48s} {value:9.2f} {unit}", flush=True)


def prefill(model, ids, cache=None):
    return model(ids, past_key_values=cache if cache is not None else DynamicCache(), use_cache=True, logits_to_keep=1)


def bench_steps(shape, model):
    ids = tokens(model, 1, 2048)
    note(shape, "prefill of 2048, alone", median_ms(lambda: prefill(model, ids), 12, REST_S))
    note(shape, "prefill of 2048, one behind the other", median_ms(lambda: prefill(model, ids), 12))
    for history in HISTORY[shape]:
        old, new = tokens(model, 1, history), tokens(model, 1, 128)
        whole = torch.cat([old, new], 1)
        note(shape, f"a turn, {history} + 128 new: recompute", median_ms(lambda: prefill(model, whole), 3))
        cache = DynamicCache()
        prefill(model, old, cache)

        def turn():
            prefill(model, new, cache)
            cache.crop(-128)

        note(shape, f"a turn, {history} + 128 new: gpu", median_ms(turn))
        del cache
    for batch in BATCHES[shape]:
        try:
            cache = DynamicCache()
            prefill(model, tokens(model, batch, 2048), cache)
            ids = tokens(model, batch, 1)
            note(shape, f"decode, batch {batch}, 2048 of context", median_ms(lambda: prefill(model, ids, cache), 10))
        except torch.OutOfMemoryError:
            print(f"{shape:5s} decode, batch {batch}: out of memory", flush=True)
        cache = None
        torch.cuda.empty_cache()


def pick_sessions(path, count):
    """As test/gpu/engine/main.ts: the first sessions of eight turns, answers cut to 64 tokens, under 7000 in all."""
    sessions = {}
    with gzip.open(path, "rt") as file:
        next(file)
        for line in file:
            session, _, _, _, new, out = line.rstrip("\n").split("\t")
            sessions.setdefault(session, []).append((int(new), min(int(out), 64)))
    fitting = []
    for turns in sessions.values():
        turns = turns[:8]
        total = sum(new + out for new, out in turns)
        if len(turns) == 8 and -(-total // 64) * 64 < 7000:
            fitting.append(turns)
    return fitting[:count]


def conversations(shape, model, path, seconds_max):
    """Rounds of turns through generate_batch (continuous batching, no cache from turn to turn). Every answer has 64
    tokens here, and a round waits for its slowest."""
    sessions = pick_sessions(path, 64)
    texts = [[] for _ in sessions]
    config = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True)
    begin, made, rounds = time.perf_counter(), 0, 0
    for turn in range(8):
        for text, turns in zip(texts, sessions):
            text.extend(torch.randint(10, model.config.vocab_size, (turns[turn][0],)).tolist())
        outputs = model.generate_batch(inputs=[list(text) for text in texts], generation_config=config)
        for (_, output), text in zip(sorted(outputs.items()), texts):
            made += len(output.generated_tokens)
            text.extend(output.generated_tokens)
        rounds += 1
        if time.perf_counter() - begin > seconds_max:
            break
    seconds = time.perf_counter() - begin
    note(shape, f"conversations, generate_batch, {rounds} of 8 rounds", made / seconds, "tokens/s")


parser = argparse.ArgumentParser()
parser.add_argument("--shapes", default="8b,13b")
parser.add_argument("--parts", default="steps,conversations")
parser.add_argument("--trace")
parser.add_argument("--seconds-max", type=float, default=60)
arguments = parser.parse_args()
print(torch.cuda.get_device_name(), "torch", torch.__version__, "transformers", transformers.__version__)
with torch.no_grad():  # generate_batch works in a thread of its own, which inference_mode does not reach
    for shape in arguments.shapes.split(","):
        model = make_model(shape)
        if "steps" in arguments.parts:
            bench_steps(shape, model)
        if "conversations" in arguments.parts and arguments.trace and shape == "8b":
            try:
                conversations(shape, model, arguments.trace, arguments.seconds_max)
            except Exception as error:
                print(f"{shape} conversations: {type(error).__name__}: {str(error)[:300]}", flush=True)
        del model
        torch.cuda.empty_cache()
