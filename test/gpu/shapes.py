"""Models of real shape with made-up weights, in the Python stack. Shapes are those of shapes.json, as the engine bench
has them."""

import json
import pathlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
# Of config.json, what names classes and types and not the shape.
NAMES = ("model_type", "architectures", "torch_dtype")


def make_model(shape):
    """In bf16 on the GPU, initialised as transformers does."""
    fields = json.loads((pathlib.Path(__file__).parent / "shapes.json").read_text())[shape]
    config_class, model_class = CLASSES[fields["model_type"]]
    config = config_class(attn_implementation="sdpa", **{name: fields[name] for name in fields if name not in NAMES})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = model_class(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()
