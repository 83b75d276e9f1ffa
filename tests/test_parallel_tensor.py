"Tensor parallelism: a Llama in parts of two groups at once, against the dense one and torch's own; losses of divided logits; what is refused."
import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm_train_course.core import IGNORE, lm_loss, tiny_llama
from llm_train_course.parallel import (
    ColumnParallelLinear,
    Cut,
    Ranks,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_full_state,
    rank_random,
    tensor_parallel,
    tensor_parallel_clip,
    tensor_parallel_grad_norm,
    tensor_parallel_lm_loss,
    vocab_parallel_cross_entropy,
)

V = 61
SEQUENCE = {"sequence_parallel": True}
REGATHER = {"sequence_parallel": True, "regather": True}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as r:
        yield r


def pair():
    "This rank's group of two: ranks 0 and 2, or 1 and 3, so that a rank's number in the group is not its number."
    if not hasattr(dist, "_pairs_of_this_test"):
        dist._pairs_of_this_test = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return dist._pairs_of_this_test[dist.get_rank() % 2]


def llama(seed=0, **kw):
    "Odd sizes, and no parameter at its initial one or zero."
    lm = tiny_llama(V, **{"hidden_size": 24, "n_heads": 4, "n_kv_heads": 2, "intermediate_size": 37, "attention_bias": True, "mlp_bias": True, "seed": seed, **kw})
    with torch.no_grad():
        for k, p in enumerate(lm.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + k))
    return lm


def batch(seed=0, T=8, rows=3):
    ids = torch.randint(2, V, (rows, T), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 5:] = 0, 0
    ids[mask == 0] = 0
    labels = ids.where(mask == 1, IGNORE)
    labels[-1, : T - 1 - seed % 2] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def apart(dense, found):
    assert dense.keys() == found.keys(), dense.keys() ^ found.keys()
    assert all(dense[k].shape == found[k].shape and dense[k].dtype == found[k].dtype for k in dense)
    return max(float((dense[k] - found[k]).abs().max() / dense[k].abs().max().clamp(min=1e-30)) for k in dense)


def gradients(lm):
    return {k: p.grad for k, p in lm.named_parameters() if p.grad is not None}


def in_groups(options, kw):
    "Two groups train different models on different rows at once."
    group, which = pair(), dist.get_rank() % 2
    one, two = llama(which, **kw), tensor_parallel(llama(which, **kw), group, **options)
    gaps = []
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (one, two)]
    for step in range(2):
        losses = [m(**batch(5 * which + step), use_cache=False).loss for m in (one, two)]
        [loss.backward() for loss in losses]
        if not step:
            gaps += [apart(gradients(one), gather_full_state(two, group, grads=True))]
        norms = [torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5), tensor_parallel_clip(two, 0.5, group)]
        gaps += [abs(float(a.detach()) / float(b.detach()) - 1) for a, b in (losses, norms)]
        [(o.step(), o.zero_grad()) for o in optimizers]
    weights = gather_full_state(two, group)
    return max(gaps), max(float((p - weights[k]).abs().max()) for k, p in one.state_dict().items()), losses[0].item()


@pytest.mark.parametrize("kw", [{}, {"tie_embeddings": False, "n_kv_heads": 1}], ids=["tied", "untied, one key head"])
@pytest.mark.parametrize("options", [{}, SEQUENCE, REGATHER], ids=["tensor", "sequence", "regather"])
def test_two_groups_equal_their_dense_models(ranks, options, kw):
    results = ranks(in_groups, options, kw)
    for gap, weights, _ in results:
        assert gap < 1e-5 and weights < 1e-4  # a tenth of a step: see the notebook
    assert results[0][2] == results[2][2] != results[1][2] == results[3][2]


def library():
    "Embedding and output matrix by rows, blocks as in the tutorials: torch's loss and gradients against ours."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    kw = dict(tie_embeddings=False, n_kv_heads=4, intermediate_size=36)
    theirs, ours = llama(**kw), tensor_parallel(llama(**kw))
    plan = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), "lm_head": ColwiseParallel(output_layouts=Replicate())}
    for i in range(2):
        plan |= {f"model.layers.{i}.{k}_proj": ColwiseParallel() for k in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")}
        plan |= {f"model.layers.{i}.{k}_proj": RowwiseParallel() for k in ("self_attn.o", "mlp.down")}
    parallelize_module(theirs, init_device_mesh("cpu", (4,)), plan)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    logits = [m(**inputs, use_cache=False).logits.detach() for m in (theirs, ours)]
    for m in (theirs, ours):
        m(**batch(), use_cache=False).loss.backward()
    full = {k: getattr(g, "full_tensor", lambda g=g: g)() for k, g in gradients(theirs).items()}
    return apart({"logits": logits[0]}, {"logits": logits[1]}), apart(full, gather_full_state(ours, grads=True))


def test_equal_to_parallelize_module(ranks):
    assert max(max(gaps) for gaps in ranks(library)) < 1e-5


def cross_entropies():
    "Random shapes, precisions and ranges: the largest error of loss and gradient against torch's on whole logits."
    g, group, worst = torch.Generator().manual_seed(1), pair(), {}
    for _ in range(60):
        vocab, rows = (int(torch.randint(*r, (), generator=g)) for r in ((2, 40), (0, 6)))
        dtype = (torch.float32, torch.bfloat16, torch.float64)[int(torch.randint(3, (), generator=g))]
        logits = (torch.randn(rows, vocab, generator=g) * 10 ** float(torch.randint(-1, 3, (), generator=g))).to(dtype)
        targets = torch.randint(-1, vocab, (rows,), generator=g)
        targets[targets < 0] = IGNORE
        cut = Cut(1, ((0, -(-vocab // 2)), (-(-vocab // 2), vocab)))
        mine, whole = cut.mine(logits, group, -(-vocab // 2)).requires_grad_(), logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        scale = torch.rand((), generator=g)
        for m, loss in ((mine, vocab_parallel_cross_entropy(mine, targets, vocab, reduction="none", group=group)), (whole, F.cross_entropy(whole, targets, ignore_index=IGNORE, reduction="none"))):
            (loss * scale).sum().backward()
            m.loss = loss.detach()
        error = torch.cat([(mine.loss - whole.loss).flatten() / (1 + whole.loss.abs()), (cut.whole(mine.grad, group) - whole.grad).double().flatten()])
        assert mine.loss.dtype == whole.dtype and mine.grad.dtype == dtype
        worst[dtype] = max(worst.get(dtype, 0.0), float(error.abs().max()) if error.numel() else 0.0)
    return worst


def test_cross_entropy_of_divided_logits(ranks):
    for worst in ranks(cross_entropies):
        assert worst[torch.float64] < 1e-12 and worst[torch.float32] < 1e-6
        assert worst[torch.bfloat16] < 2**-8  # the gradient is rounded into BF16, the loss is not


def interface():
    "The loss as transformers computes it: shifted labels, a number of items, no targets at all."
    one, two, rows = llama(), tensor_parallel(llama()), batch()
    shifted = F.pad(rows["labels"], (0, 1), value=IGNORE)[:, 1:].contiguous()
    gaps = []
    for extra in ({}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": shifted}):
        a, b = (m(**rows, **extra, use_cache=False) for m in (one, two))
        gaps.append(abs(a.loss.item() / b.loss.item() - 1))
    nothing = two(**rows | {"labels": torch.full_like(rows["labels"], IGNORE)}, use_cache=False).loss
    nothing.backward()
    seen = b.logits, nothing.item(), float(tensor_parallel_grad_norm(two))
    plain = [m(rows["input_ids"], use_cache=False, logits_to_keep=2).logits.detach() for m in (one, two)]
    return gaps, seen, apart({"": plain[0]}, {"": plain[1]})


def test_the_interface_of_transformers_stays(ranks):
    for gaps, seen, plain in ranks(interface):
        assert max(gaps) < 1e-6 and plain < 1e-5
        assert seen == (None, 0.0, 0.0)


class Widths(TorchDispatchMode):
    "The last dimensions of all tensors that any operation makes."

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.shape[-1] for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor) and t.ndim}
        return out


def widths(how):
    lm, rows = tensor_parallel(llama()), batch()
    with Widths() as w:
        loss = {"labels": lambda: lm(**rows, use_cache=False).loss, "sum": lambda: tensor_parallel_lm_loss(lm, rows), "joined": lambda: lm_loss(lm, rows)}[how]()
        loss.backward()
    return V in w.seen, -(-V // 4) in w.seen


@pytest.mark.parametrize(("how", "whole"), [("labels", False), ("sum", False), ("joined", True)])
def test_whole_logits_never_exist(ranks, how, whole):
    assert ranks(widths, how) == [(whole, True)] * 4


def frozen_and_again(options):
    """Frozen matrices, two micro-batches, recomputed blocks, a graph used twice: gradients add up as the dense model's do."""
    one, two = llama(), tensor_parallel(llama(), **options)
    for m in (one, two):
        for layer, name in ((m.model.layers[0].self_attn, "k_proj"), (m.model.layers[1].mlp, "gate_proj")):
            getattr(layer, name).weight.requires_grad_(False)
        m.model.layers[1].input_layernorm.weight.requires_grad_(False)
        m.train()
        if m is two:
            getattr(m, "activation_checkpointing_enable", m.gradient_checkpointing_enable)()
        m(**batch(1), use_cache=False).loss.backward()
    getattr(two, "activation_checkpointing_disable", two.gradient_checkpointing_disable)()
    for m in (one, two):
        loss = m(**batch(2), use_cache=False).loss
        loss.backward(retain_graph=True), loss.backward()
    norms = float(torch.nn.utils.clip_grad_norm_(one.parameters(), 1e9)), float(tensor_parallel_grad_norm(two))
    return apart(gradients(one), gather_full_state(two, grads=True)), norms[0] / norms[1] - 1


@pytest.mark.parametrize("options", [{}, SEQUENCE, REGATHER], ids=["tensor", "sequence", "regather"])
def test_frozen_accumulated_recomputed(ranks, options):
    for gap, norm in ranks(frozen_and_again, options):
        assert gap < 1e-5 and abs(norm) < 1e-5


def low_precision(options, autocast):
    "How far BF16 gradients are from the dense FP32 ones, divided and dense."
    exact, dense, divided = llama(), llama(), llama()
    if not autocast:
        dense, divided = dense.bfloat16(), divided.bfloat16()
    divided = tensor_parallel(divided, **options)
    exact(**batch(), use_cache=False).loss.backward()
    for m in (dense, divided):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = m(**batch(), use_cache=False).loss
        loss.backward()
    flat = lambda grads: torch.cat([grads[k].float().flatten() for k in sorted(grads)])
    truth, a, b = (flat(g) for g in (gradients(exact), gradients(dense), gather_full_state(divided, grads=True)))
    return float((a - truth).norm() / truth.norm()), float((b - truth).norm() / truth.norm()), str(loss.dtype)


@pytest.mark.parametrize("autocast", [False, True], ids=["BF16", "autocast"])
@pytest.mark.parametrize("options", [{}, REGATHER], ids=["tensor", "regather"])
def test_bf16_is_as_exact_as_the_dense_model(ranks, options, autocast):
    for dense, divided, dtype in ranks(low_precision, options, autocast):
        assert 1e-4 < divided < 2 * dense < 0.2
        assert dtype == "torch.float32"


def copies_and_alone():
    "A deep copy is a model of its own; a group of one rank is the dense model."
    lm = tensor_parallel(llama())
    twin = copy.deepcopy(lm)
    twin(**batch(), use_cache=False).loss.backward()
    own = all(p.grad is None for p in lm.parameters()), len(gradients(twin)) == len(list(lm.parameters()))
    tied = twin.lm_head.weight is twin.model.embed_tokens.weight
    alone = [dist.new_group([r]) for r in range(4)][dist.get_rank()]
    one, two = llama(), tensor_parallel(llama(), alone, **SEQUENCE)
    for m in (one, two):
        m(**batch(T=7), use_cache=False).loss.backward()
    return own, tied, apart(gradients(one), gather_full_state(two, alone, grads=True))


def test_deep_copy_and_a_group_of_one(ranks):
    for own, tied, gap in ranks(copies_and_alone):
        assert own == (True, True) and tied and gap < 1e-6


def unclipped():
    "A norm under the limit changes nothing; no gradients, no norm; what clips, clips by torch's factor."
    lm = tensor_parallel(llama(n_kv_heads=1))
    none = float(tensor_parallel_grad_norm(lm))
    lm(**batch(), use_cache=False).loss.backward()
    before = gather_full_state(lm, grads=True)
    norm = float(tensor_parallel_clip(lm, 1e6))
    kept = apart(before, gather_full_state(lm, grads=True))
    tensor_parallel_clip(lm, norm / 4)
    dense = math.sqrt(sum(float(g.double().square().sum()) for g in before.values()))
    return none, kept, norm / dense - 1, float(tensor_parallel_grad_norm(lm)) / norm


def test_clipping(ranks):
    for none, kept, gap, quarter in ranks(unclipped):
        assert none == 0 and kept == 0 and abs(gap) < 1e-6 and quarter == pytest.approx(0.25, rel=1e-5)


def generators(seed):
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    with rank_random():
        inside = torch.rand(3)
    moved = not torch.equal(before, torch.get_rng_state())
    try:
        with rank_random():
            raise KeyError
    except KeyError:
        pass
    return inside.tolist(), moved, torch.rand(()).item()


def test_generators_inside_and_outside(ranks):
    first, again, other = (ranks(generators, s) for s in (0, 0, 1))
    assert first == again and len({tuple(r[0]) for r in first + other}) == 8
    assert all(r[1] for r in first) and len({r[2] for r in first}) == 1


def messages():
    def said(fn):
        try:
            fn()
        except (ValueError, IndexError) as e:
            return str(e)

    lora = llama()
    lora.model.layers[0].self_attn.q_proj = nn.Sequential(lora.model.layers[0].self_attn.q_proj)
    logits = torch.zeros(2, 3)
    odd = llama()
    with torch.no_grad():
        odd.model.norm.weight[dist.get_rank()] += 1  # the sums agree, those of squares do not
    return [said(fn) for fn in (
        lambda: tensor_parallel(lora), lambda: tensor_parallel(llama().model),
        lambda: tensor_parallel(odd), lambda: ColumnParallelLinear(nn.Linear(5, 3)), lambda: RowParallelLinear(nn.Linear(3, 5)),
        lambda: VocabParallelEmbedding(nn.Embedding(9, 2))(torch.tensor([-1])), lambda: VocabParallelEmbedding(nn.Embedding(9, 2, max_norm=1.0)),
        lambda: vocab_parallel_cross_entropy(logits, torch.tensor([0, 9]), 9), lambda: vocab_parallel_cross_entropy(logits, torch.tensor([0, 1]), 13),
        lambda: vocab_parallel_cross_entropy(logits, torch.tensor([0, 1]), reduction="max"),
    )]


def test_refusals_name_what_is_wrong(ranks):
    expected = ["q_proj is a Sequential", "got LlamaModel", "model.norm.weight is not the same on all ranks", "3 features cannot be divided over 4 ranks",
                "3 features cannot be divided over 4 ranks", "token id -1 is outside the vocabulary of 9", "max_norm", "target 9 is outside the vocabulary of 9",
                "a vocabulary of 13 over 4 ranks has 4 columns on each, the logits have 3", "reduction must be mean, sum or none, got 'max'"]
    for said in ranks(messages):
        assert all(e in s for e, s in zip(expected, said, strict=True)), said


def linear(bias, options, dtype):
    "A column- and a row-parallel layer of uneven parts with a non-linearity between, without a bias or with, and a frozen weight."
    torch.manual_seed(0)
    up, down = nn.Linear(5, 9, bias, dtype=dtype), nn.Linear(9, 6, bias, dtype=dtype)
    x = torch.randn(2, 4, 5, dtype=dtype)
    up.weight.requires_grad_(not options.get("frozen"))
    column, row = ColumnParallelLinear(up), RowParallelLinear(down)
    pairs = [(t.clone().requires_grad_(), m) for t, m in ((x, lambda t: down(F.gelu(up(t)))), (x, lambda t: row(F.gelu(column(t)))))]
    outs = [m(t) for t, m in pairs]
    [y.square().sum().backward() for y in outs]
    holder = nn.ModuleDict({"up": column, "down": row})
    dense = nn.ModuleDict({"up": up, "down": down})
    return apart({"y": outs[0].detach(), "x": pairs[0][0].grad}, {"y": outs[1].detach(), "x": pairs[1][0].grad}), apart(gradients(dense), gather_full_state(holder, grads=True))


@pytest.mark.parametrize("options", [{}, {"frozen": True}], ids=["", "frozen"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_of_uneven_parts(ranks, bias, options):
    for gaps in ranks(partial(linear, bias, options), torch.float64):
        assert max(gaps) < 1e-13  # in float64, so that only mistakes are left


def gathered_padded(size, copies):
    dense = nn.Linear(3, size)
    with torch.no_grad():
        for p in dense.parameters():
            p.copy_(torch.arange(p.numel()).view_as(p) / 7)
    x = torch.arange(6.0).view(2, 3)
    try:
        layer = ColumnParallelLinear(dense, gather_output=True, pad=copies == 1, copies=copies)
    except ValueError as e:
        return str(e)
    return float((layer(x) - dense(x)).abs().max())


@pytest.mark.parametrize("size", [5, 8, 3])
def test_gathered_columns_are_the_dense_ones_with_padding_too(ranks, size):
    assert max(ranks(gathered_padded, size, 1)) == 0


def test_columns_that_are_copies_are_not_gathered(ranks):
    assert all("2 ranks have the same part" in said for said in ranks(gathered_padded, 4, 2))
