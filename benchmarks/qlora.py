"""Four-bit storage and the 4-bit layer against bitsandbytes on this machine's CPU. Same codes on both sides.

`python benchmarks/run.py qlora_quantize_4bit qlora_linear_4bit` runs them; ratios are theirs / ours: above 1, ours is the faster side.
"""

import torch


def quantize_4bit(repeat, folder):
    "Quantize and dequantize a 4,096 x 4,096 weight."
    import bitsandbytes.functional as theirs
    from run import alternate

    from llm_train_course import qlora as ours

    def pair(x, kind, double):
        q = ours.quantize_4bit(x, 64, kind, double)
        codes, state = theirs.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=double)
        assert torch.equal(q.codes, codes)
        name = f"{kind}{', double' if double else ''}, {str(x.dtype).removeprefix('torch.')}"
        quantize = (lambda: ours.quantize_4bit(x, 64, kind, double),
                    lambda: theirs.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=double))
        return {f"quantize {name}": alternate(*quantize, repeat),
                f"dequantize {name}": alternate(q.dequantize, lambda: theirs.dequantize_4bit(codes, state), repeat)}

    rows, x = {}, torch.randn(4096, 4096)
    for dtype in (torch.float32, torch.bfloat16):
        for kind, double in (("nf4", False), ("nf4", True), ("fp4", False)):
            rows |= pair(x.to(dtype), kind, double)
    return rows


def linear_4bit(repeat, folder):
    "Forward and backward through a 1,536 x 576 layer (SmolLM2's up_proj) on 512 tokens: bitsandbytes', and a dense one."
    import copy

    import bitsandbytes as bnb
    from run import alternate

    from llm_train_course.qlora import Linear4bit

    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.nn.Linear(576, 1536, bias=False).to(dtype).requires_grad_(False)
        ours, theirs = Linear4bit.from_linear(copy.deepcopy(dense)), bnb.nn.Linear4bit(576, 1536, bias=False, quant_type="nf4")
        theirs.load_state_dict(dense.state_dict())
        theirs = theirs.to(dtype).to("cpu").train()
        x = torch.randn(512, 576, dtype=dtype, requires_grad=True)

        def both_ways(layer, x=x):
            return lambda: layer(x).sum().backward()
        for name, other in (("bitsandbytes", theirs), ("dense", dense)):
            rows[f"against {name}, {str(dtype).removeprefix('torch.')}"] = alternate(both_ways(ours), both_ways(other), repeat)
    return rows


BENCHES = {f"qlora_{f.__name__}": f for f in (quantize_4bit, linear_4bit)}
