"""Writes a model of real shape with made-up bf16 weights as a Hugging Face checkpoint, and the reference
implementation's logits of it: in fp32, and how far its own bf16 is from them. usage: reference-logits.py SHAPE DIRECTORY
Files beside the checkpoint: tokens.i32, logits.f32 (positions, vocab), reference.json."""

import json
import sys
import time
import torch
from shapes import make_model

POSITIONS = 512

shape, directory = sys.argv[1:3]
torch.manual_seed(1)
model = make_model(shape)
config = model.config
with torch.inference_mode():
    # As GPT-2 is initialised: what layers add to the residual shrinks with their number. Without it a model of made-up
    # weights blows every rounding up, the reference's too.
    model.model.embed_tokens.weight.normal_()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
        layer.mlp.down_proj.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    model.lm_head.weight.mul_(2)  # about as peaked as a language model's distributions
    begin = time.perf_counter()
    model.save_pretrained(directory)
    print(f"checkpoint written in {time.perf_counter() - begin:.1f} s", flush=True)
    ids = torch.randint(10, config.vocab_size, (1, POSITIONS), device="cuda")
    in_bf16 = model(ids).logits[0].float().log_softmax(-1)
    torch.backends.cuda.matmul.allow_tf32 = False
    logits = model.float()(ids).logits[0]
    in_fp32 = logits.log_softmax(-1)
    divergence = (in_fp32.exp() * (in_fp32 - in_bf16)).sum(-1)
    agreement = (in_fp32.argmax(-1) == in_bf16.argmax(-1)).float().mean().item()
    entropy = -(in_fp32.exp() * in_fp32).sum(-1).mean().item()
    ids.to(torch.int32).cpu().numpy().tofile(f"{directory}/tokens.i32")
    logits.cpu().numpy().tofile(f"{directory}/logits.f32")
summary = {"divergence": divergence.mean().item(), "agreement": agreement, "entropy": entropy}
with open(f"{directory}/reference.json", "w") as file:
    json.dump(summary, file)
print(json.dumps(summary))
