"""The LoRA layer and a LoRA model against PEFT on this machine's CPU: same weights, same batches, same threads.

`python benchmarks/run.py lora_layer lora_model` runs them; ratios are theirs / ours: above 1, ours is the faster side.
"""
import copy

import torch
from torch import nn


def lora_layer(repeat, folder):
    "Forward and backward through one adapted layer of SmolLM2 (576 to 1,536 and back, r = 16) on 1,024 tokens."
    from peft import LoraConfig, get_peft_model
    from run import alternate

    from llm_train_course.lora import add_lora

    def steps(model, x, n=4):
        def run():
            for _ in range(n):
                model(x).sum().backward()
        return run

    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        for size in ((576, 1536), (1536, 576)):
            ours = nn.Sequential(nn.Linear(*size, bias=False)).to(dtype)
            theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=16, lora_alpha=24, target_modules=["0"]))
            add_lora(ours, 16, 24, ["0"])
            x = torch.randn(1024, size[0], dtype=dtype, requires_grad=True)
            name = f"layer {size[0]} to {size[1]}, {str(dtype).removeprefix('torch.')}"
            rows[name] = alternate(steps(ours, x), steps(theirs, x), repeat)
    return rows


def lora_model(repeat, folder):
    "Eight forward and backward passes of a small Llama (hidden size 256, 4 layers), LoRA r = 8 on all linear layers."
    from peft import LoraConfig, get_peft_model
    from run import alternate

    from llm_train_course.core import tiny_llama
    from llm_train_course.lora import add_lora

    def steps(model, ids):
        def run():
            for _ in range(8):
                model(input_ids=ids, labels=ids).loss.backward()
        return run

    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 16), (8, 128)):
            ours = tiny_llama(1024, hidden_size=256, n_layers=4, n_kv_heads=2).to(dtype)
            theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=8, lora_alpha=12, target_modules="all-linear"))
            add_lora(ours, 8, 12)
            ids = torch.randint(0, 1024, shape)
            name = f"model, {shape[0]} rows of {shape[1]} tokens, {str(dtype).removeprefix('torch.')}"
            rows[name] = alternate(steps(ours.train(), ids), steps(theirs.train(), ids), repeat)
    return rows


BENCHES = {f.__name__: f for f in (lora_layer, lora_model)}
