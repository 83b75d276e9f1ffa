"Memory: splits, accumulation on two ranks, kept bytes, checkpointing against torch's own, offloading, the step inside the backward pass."
import copy
import gc
import itertools
import math
import pickle
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as library
from helpers import ROWS, TOKENIZER, flat, model, on_two_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from llm_train_course.core import IGNORE, PaddedBatches, TrainConfig, _Objective, fit, generate, lm_loss, tiny_llama
from llm_train_course.lora import add_lora
from llm_train_course.memory import (
    CheckpointError,
    GPTLayer,
    _State,
    accumulate_grads,
    adam_bytes,
    best_segment,
    checkpoint,
    checkpoint_blocks,
    count_targets,
    decoder_blocks,
    gpt_layer_bytes,
    llama_layer_bytes,
    offload_activations,
    peak_bytes,
    run_recursively,
    run_segments,
    saved_bytes,
    saved_tensors,
    segment_peak,
    segments,
    split_batch,
    step_in_backward,
)

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=cuda)]
theirs = partial(library.checkpoint, use_reentrant=False)
plainly = lambda fn, *args, **kwargs: fn(*args, **kwargs)
BATCH = PaddedBatches(ROWS, 9, TOKENIZER.pad_token_id, shuffle=False).collate(range(9))
LEFT = PaddedBatches(ROWS[:4], 4, TOKENIZER.pad_token_id, side="left", shuffle=False).collate(range(4))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def grads(m):
    return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}


# Splitting


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(0, 4095))
def test_a_split_inverts_the_product_or_is_refused(micro, steps, world, extra):
    total = micro * steps * world
    assert split_batch(total, micro, world) == steps
    extra %= micro * world
    if extra:
        with pytest.raises(ValueError, match=rf"global batch {total + extra} is no multiple of micro-batch {micro} × {world} ranks = {micro * world}; {total} or {total + micro * world} would be"):
            split_batch(total + extra, micro, world)


@pytest.mark.parametrize("arguments, message", [
    ((256, 0), "micro_batch must be a positive integer, got 0"), ((-8, 4), "global_batch must be a positive integer, got -8"),
    ((8, 4, 0), "world_size must be a positive integer, got 0"), ((8.0, 4), "global_batch must be a positive integer, got 8.0"),
    ((8, True), "micro_batch must be a positive integer, got True"), ((3, 4), "= 4; 4 would be"),
])  # fmt: skip
def test_what_no_split_can_be_made_of(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        split_batch(*arguments)


# Accumulation


def parts_of(size, side="right"):
    layout = PaddedBatches(ROWS, size, TOKENIZER.pad_token_id, side=side, shuffle=False)
    return [layout.collate(item) for item in layout.plan()]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_every_split_gives_the_gradient_of_the_whole_batch(size, side):
    whole, split, wrong = model(), model(), model()
    expected = accumulate_grads(whole, parts_of(9, side))
    parts = parts_of(size, side)
    for part in parts:
        del part["n_targets"]  # counted from the labels then
    got = accumulate_grads(split, parts)
    assert abs(float(got - expected)) < 1e-6 * float(expected)
    for name, g in grads(whole).items():
        assert (grads(split)[name] - g).norm() <= 1e-6 * g.norm() + 1e-9, name
    accumulate_grads(wrong, parts, per_micro_batch=True)
    assert max((grads(wrong)[n] - g).norm() / g.norm() for n, g in grads(whole).items()) > 1e-3


def test_equal_to_autograd_of_the_mean():
    m, reference = model(), model()
    accumulate_grads(m, parts_of(2))
    logits = reference(**{k: BATCH[k] for k in ("input_ids", "attention_mask", "position_ids")}).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten(), ignore_index=IGNORE).backward()
    for name, g in grads(reference).items():
        torch.testing.assert_close(grads(m)[name], g, rtol=2e-5, atol=1e-7)


def test_a_batch_without_targets_and_frozen_parameters():
    m = model()
    m.model.layers[0].requires_grad_(False)
    empty = {**BATCH, "labels": torch.full_like(BATCH["labels"], IGNORE)}
    del empty["n_targets"]
    assert count_targets(empty) == 0 and float(accumulate_grads(m, [empty, empty])) == 0
    assert all(torch.isfinite(g).all() and not g.any() for g in grads(m).values())
    assert all(p.grad is None for p in m.model.layers[0].parameters())
    with pytest.raises(ValueError, match="there is no micro-batch"):
        accumulate_grads(m, [])


def test_one_process_adds_to_gradients_as_torch_does():
    m = model()
    accumulate_grads(m, [BATCH])
    once = {n: g.clone() for n, g in grads(m).items()}
    accumulate_grads(m, [BATCH])
    assert all(torch.equal(g, 2 * once[n]) for n, g in grads(m).items())


def two_ranks_accumulate(rank, folder):
    "Rank 0 has three micro-batches, rank 1 one; then one of them has none; with and without DDP; with a stale gradient."
    import torch.distributed as dist
    dist.init_process_group("gloo")
    parts, out = parts_of(2), {}
    mine = {"plain": parts[:4] if rank == 0 else parts[4:], "empty": parts if rank == 0 else []}
    for name, batches in mine.items():
        m = model()
        m.extra = nn.Parameter(torch.ones(3))  # gets a gradient nowhere: must stay None
        out[f"{name}_loss"] = accumulate_grads(m, batches)
        assert m.extra.grad is None
        out[name] = grads(m)
    ddp = nn.parallel.DistributedDataParallel(_Objective(model(), lm_loss))
    total = lambda wrapped, batch: wrapped(batch)[0]
    out["ddp_loss"] = accumulate_grads(ddp, mine["plain"], total)
    out["ddp"] = grads(ddp.module.model)
    for wrapped, batches, message in ((ddp, mine["plain"], "has a gradient already: summing over ranks would count it 2 times"),
                                      (nn.parallel.DistributedDataParallel(_Objective(model(), lm_loss)), mine["empty"], "every rank needs a micro-batch")):
        try:
            accumulate_grads(wrapped, batches, total)
            raise AssertionError("accepted")
        except ValueError as e:
            assert message in str(e)
    with pytest.raises(ValueError, match="would come before 2 ranks have shared their gradients"), step_in_backward(torch.optim.SGD(model().parameters())):
        pass
    wrong = model()
    accumulate_grads(wrong, mine["plain"], per_micro_batch=True)
    out["wrong"] = grads(wrong)
    torch.save(out, Path(folder) / f"{rank}.pt")


def test_two_ranks_give_the_gradient_of_the_whole_batch(tmp_path):
    on_two_ranks(two_ranks_accumulate, tmp_path, "fork")
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    m = model()
    loss = accumulate_grads(m, [BATCH])
    for name in ("plain", "empty", "ddp"):
        assert float(a[f"{name}_loss"]) == float(b[f"{name}_loss"]) and abs(float(a[f"{name}_loss"] - loss)) < 1e-6 * float(loss)
        assert a[name].keys() == grads(m).keys()
        for key, g in grads(m).items():
            assert torch.equal(a[name][key], b[name][key])
            assert (a[name][key] - g).norm() <= 1e-6 * g.norm() + 1e-9, (name, key)
    assert max((a["wrong"][n] - g).norm() / g.norm() for n, g in grads(m).items()) > 1e-3


# What is kept


def graph_bytes(out, exclude):
    "Another way to count: walk the graph and look at every `_saved_` attribute and saved_tensors of its nodes."
    seen, todo, storages = set(), [out.grad_fn], {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        values += [node.saved_tensors] if hasattr(node, "saved_tensors") else []
        for value in values:
            for t in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(t, torch.Tensor) and not (t.ndim == 0 and t.dtype == torch.float64):  # Python numbers are no tensors to the hooks
                    storages[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)
    skip = {p.untyped_storage()._cdata for m in exclude for p in [*m.parameters(), *m.buffers()]}
    return sum(n for key, (n, _) in storages.items() if key not in skip)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("adapters", [False, True])
def test_kept_bytes_agree_with_a_walk_over_the_graph(attention, adapters):
    m = model(attn_implementation=attention)
    if adapters:
        add_lora(m, 3, 8)
    assert saved_bytes(lm_loss, m, LEFT, exclude=[m]) == graph_bytes(lm_loss(m, LEFT), [m]) > 0


def test_kept_bytes_count_what_is_alive_each_storage_once():
    x = torch.randn(4, 6, requires_grad=True)
    assert [k.shape for k in saved_tensors(lambda t: (t.exp() @ t.T).sum(), x)] == [(4, 6), (6, 4)]
    layer = nn.Linear(6, 5)
    assert saved_bytes(layer, x) == saved_bytes(layer.forward, x) == x.nbytes  # its weight is known through the method, too
    assert saved_bytes(lambda t: layer(t), x) == x.nbytes + layer.weight.nbytes
    assert saved_bytes(lambda t: (t.exp(), None)[1], x) == 0
    gc.collect()
    gc.disable()
    try:
        saved_bytes(lambda t: t.sigmoid().tanh().softmax(-1), torch.randn(3, 1234, requires_grad=True))
        assert not any(type(o) is torch.Tensor and o.shape == (3, 1234) for o in gc.get_objects())
    finally:
        gc.enable()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 33), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.sampled_from(["none", "selective", "full"]))
def test_a_gpt_layer_keeps_what_the_paper_says(s, b, a, d, recompute):
    h = a * 2 * d
    layer = GPTLayer(h, a, selective=recompute == "selective").bfloat16()
    x = torch.randn(b, s, h, dtype=torch.bfloat16, requires_grad=True)
    call = partial(checkpoint, layer) if recompute == "full" else layer
    assert saved_bytes(call, x, exclude=[layer]) == gpt_layer_bytes(s, b, h, a, recompute, statistic_bytes=2)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 24), st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (6, 3), (5, 5)]), st.sampled_from([4, 8]),
       st.integers(3, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["eager", "sdpa"]), st.sampled_from(["none", "selective", "full"]))
@example(9, 1, (4, 1), 8, 12, torch.float32, "eager", "none")  # one row, one head of keys: repeating it copies nothing
@example(9, 2, (4, 1), 8, 12, torch.bfloat16, "eager", "none")
def test_a_llama_layer_keeps_what_is_derived(s, b, heads, d, m, dtype, attention, recompute):
    a, a_kv = heads
    kept = []
    for n in (1, 3):  # the difference of two more layers leaves everything else out
        lm = tiny_llama(16, hidden_size=a * d, n_heads=a, n_kv_heads=a_kv, intermediate_size=m, n_layers=n, attn_implementation=attention).to(dtype)
        checkpoint_blocks(lm, recompute)
        kept.append(saved_bytes(lm.model, torch.ones(b, s, dtype=torch.long), use_cache=False))
    assert kept[1] - kept[0] == 2 * llama_layer_bytes(s, b, a * d, m, a, a_kv, d, dtype.itemsize, attention, recompute)


@pytest.mark.parametrize("call, message", [
    (lambda: gpt_layer_bytes(8, 1, 8, 2, "half"), "recompute must be none, selective or full, got 'half'"),
    (lambda: llama_layer_bytes(8, 1, 8, 8, 2, w=8), "w must be one of 2, 4, got 8"),
    (lambda: llama_layer_bytes(8, 1, 8, 8, 2, attention="flash"), "attention must be one of eager, sdpa, got 'flash'"),
    (lambda: GPTLayer(10, 4), "h must be a multiple of a, got 10 and 4"),
])  # fmt: skip
def test_formulas_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# checkpoint


class Block(nn.Module):
    "Dropout, a frozen and a tied weight, keyword and nested arguments, results in a dict."

    def __init__(self, p=0.3):
        super().__init__()
        self.a, self.b, self.frozen, self.p = nn.Linear(6, 20), nn.Linear(20, 6), nn.Linear(6, 6).requires_grad_(False), nn.Dropout(p)

    def forward(self, pair, *, scale, power=2, extra=None):
        left, right = pair["left"], pair["both"][1]
        hidden = self.p(F.silu(self.a(left)) ** power * scale)
        hidden = hidden @ self.a.weight @ self.a.weight.T
        out = self.frozen(self.b(hidden))
        return {"out": out + right, "more": (out.exp().clamp(max=3) * right, power), "count": extra}


def run_block(wrap, dtype=torch.float32, device="cpu", depth=1, autocast=None, values=None, seed=0):
    torch.manual_seed(seed)
    block = Block().to(device, dtype)
    left, right, scale = torch.randn(5, 6), torch.randn(5, 6), torch.rand(20)
    if values is not None:
        left.flatten()[: len(values)] = torch.tensor(values)
    left, right, scale = (t.to(device, dtype) for t in (left, right, scale))
    right.requires_grad_(), scale.requires_grad_()
    call = block
    for _ in range(depth):
        call = partial(wrap, call)
    with torch.autocast(device, autocast) if autocast else nullcontext():
        out = call({"left": left, "both": (3, right)}, scale=scale, extra="text")
    assert out["count"] == "text" and out["more"][1] == 2
    loss = out["out"].float().sum() + out["more"][0].float().square().sum()
    trained = [right, scale, *[p for p in block.parameters() if p.requires_grad]]
    return [out["out"], out["more"][0], *torch.autograd.grad(loss, trained), torch.rand(4, device=device)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_checkpoint_is_torch_s_to_the_bit(depth, dtype, autocast, device):
    plain, library_s, ours = (run_block(w, dtype, device, depth, autocast) for w in (plainly, theirs, checkpoint))
    assert same(plain, ours) and same(library_s, ours)


@pytest.mark.parametrize("values", [[math.inf], [math.nan, 1.0], [1e-40, -1e-42, 0.0, -0.0], [3e38, -3e38]])
def test_checkpoint_passes_special_values_on(values):
    plain, ours = (run_block(w, values=values) for w in (plainly, checkpoint))
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(plain, ours))


def test_autocast_of_a_device_in_use_is_replayed_without_a_tensor_argument(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if not torch.amp.is_autocast_available("cuda"):
        pytest.skip("this torch has no autocast for CUDA")
    torch.set_autocast_enabled("cuda", True)
    try:
        state = _State([], preserve_rng=False)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert [(kind, on) for kind, on, _ in state.autocast] == [("cpu", False), ("cuda", True)]


def test_without_replay_the_masks_differ():
    x = torch.ones(50, requires_grad=True)
    out = checkpoint(nn.Dropout(0.5), x, preserve_rng=False)
    torch.manual_seed(123)
    assert not torch.equal(torch.autograd.grad(out.sum(), x)[0] == 0, out == 0)
    torch.manual_seed(1)
    out = checkpoint(nn.Dropout(0.5), x)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0] == 0, out == 0)
    assert torch.equal(state, torch.get_rng_state())  # and leaves the generator where it was


def test_what_needs_no_gradient():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    out = checkpoint(layer, x)
    assert same(torch.autograd.grad(out.sum(), [*layer.parameters()]), torch.autograd.grad(layer(x).sum(), [*layer.parameters()]))
    with torch.no_grad():
        assert not checkpoint(layer, x).requires_grad
    with torch.inference_mode():
        assert checkpoint(layer, x).is_inference()
    frozen = nn.Linear(3, 3).requires_grad_(False)
    assert not checkpoint(frozen, x).requires_grad
    assert checkpoint(lambda: 7) == 7 and checkpoint(lambda *a, k=None: (a, k), 1, "a", k=[None]) == ((1, "a"), [None])
    some = checkpoint(lambda a, b: (a * 2, b * b), torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True))
    some[1].sum().backward()  # only one of two results is used


def test_empty_tensors_and_integers():
    x, index = torch.randn(0, 4, requires_grad=True), torch.tensor([2, 0])
    checkpoint(lambda t: (t @ t.T).exp(), x).sum().backward()
    assert x.grad.shape == (0, 4)
    table = torch.randn(5, 3, requires_grad=True)
    a = torch.autograd.grad(checkpoint(F.embedding, index, table).square().sum(), table)[0]
    assert torch.equal(a, torch.autograd.grad(F.embedding(index, table).square().sum(), table)[0])


def test_two_backward_passes_and_one_over_a_part():
    block, x = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh()), torch.randn(3, 4, requires_grad=True)
    calls = []
    out = checkpoint(lambda t: (calls.append(1), block(t))[1], x)
    wanted = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    first = torch.autograd.grad(out.sum(), [x, *block.parameters()], retain_graph=True)
    last, = torch.autograd.grad(out.sum(), [block[2].bias], retain_graph=True)
    again = torch.autograd.grad(out.sum(), [x, *block.parameters()])
    assert same(first, wanted) and same(again, wanted) and torch.equal(last, wanted[-1])
    assert 3 <= len(calls) <= 4


def test_second_derivatives():
    x = torch.rand(4, dtype=torch.float64, requires_grad=True)
    fn = lambda t: checkpoint(lambda u: (u.sin() * u).exp().cumsum(0), t)
    assert torch.autograd.gradcheck(fn, x) and torch.autograd.gradgradcheck(fn, x)


def test_gradients_computed_inside():
    def penalty(x, w):
        slope, = torch.autograd.grad((x @ w).tanh().sum(), x, create_graph=True)
        return slope.square().sum()
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    assert same(torch.autograd.grad(checkpoint(penalty, x, w), [x, w]), torch.autograd.grad(penalty(x, w), [x, w]))


def test_an_error_in_the_function_and_one_when_it_is_run_again():
    with pytest.raises(ZeroDivisionError):
        checkpoint(lambda t: 1 / 0, torch.ones(1, requires_grad=True))
    turns = itertools.count()

    def late(t):
        if next(turns):
            raise KeyError("second time")
        return t.exp()
    out = checkpoint(late, torch.ones(1, requires_grad=True))
    with pytest.raises(KeyError, match="second time"):
        out.backward()


@pytest.mark.parametrize("second, early_stop, message", [
    (lambda t: t[:2].exp(), True, r"saved tensor 0 is \(\(2, 3\), torch.float32.* and was \(\(4, 3\)"),
    (lambda t: t.double().exp(), True, "saved tensor 0 is .*float64.* and was .*float32"),
    (lambda t: t * 1, True, "0 tensors were saved when recomputed, 1 before"),
    (lambda t: t.exp().exp(), False, "saved tensor 1 .* and was nothing"),
])  # fmt: skip
def test_a_function_that_does_something_else_is_refused(second, early_stop, message):
    turns = itertools.count()
    x = torch.randn(4, 3, requires_grad=True)
    out = checkpoint(lambda t: second(t) if next(turns) else t.exp(), x, early_stop=early_stop)
    with pytest.raises(CheckpointError, match=message):
        out.sum().backward()


def test_inputs_changed_in_place_are_noticed_as_by_the_library():
    for wrap in (theirs, checkpoint):
        x, y = torch.ones(3, requires_grad=True), torch.ones(3)
        out = wrap(lambda a, b: a * b, x, y)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_weight_changed_before_the_backward_pass_is_noticed_as_by_autograd():
    for wrap, error in ((plainly, "modified by an inplace operation"), (checkpoint, "the function must do the same twice")):
        net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3, requires_grad=True)
        loss = wrap(net, x).sum()
        with torch.no_grad():
            net[2].weight.mul_(2)
        with pytest.raises(RuntimeError, match=error):
            loss.backward()
    for context in (nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)):
        m = checkpoint_blocks(model(n_layers=2), 2)
        with context():
            loss = lm_loss(m, BATCH)
        with torch.no_grad():
            decoder_blocks(m)[0].mlp.up_proj.weight.add_(1)
        with pytest.raises(CheckpointError, match="the function must do the same twice"):
            loss.backward()


def test_a_function_that_catches_exceptions_can_be_stopped_early():
    caught = []

    def careful(t):
        try:
            return t.exp().sin()
        except Exception as error:
            caught.append(error)
            return t * 0
    x = torch.randn(3, requires_grad=True)
    for fn in (careful, lambda t: checkpoint(careful, t)):
        slope, = torch.autograd.grad(checkpoint(fn, x).sum(), x)
        assert torch.equal(slope, torch.autograd.grad(x.exp().sin().sum(), x)[0]) and not caught


def test_nested_checkpoints_keep_the_outer_input_only():
    inner, x = nn.Sequential(nn.Linear(8, 99), nn.Tanh(), nn.Linear(99, 8)), torch.randn(4, 8, requires_grad=True)
    outer = lambda t: checkpoint(inner, checkpoint(inner, t.sin()).cos())
    assert saved_bytes(checkpoint, outer, x) == x.nbytes == saved_bytes(theirs, outer, x)
    assert same(torch.autograd.grad(checkpoint(outer, x).sum(), [x, *inner.parameters()]), torch.autograd.grad(outer(x).sum(), [x, *inner.parameters()]))
    mixed = lambda t: theirs(inner, checkpoint(inner, t))
    assert same(torch.autograd.grad(checkpoint(mixed, x).sum(), [x, *inner.parameters()]), torch.autograd.grad(mixed(x).sum(), [x, *inner.parameters()]))


def test_nothing_is_left_over_after_a_backward_pass():
    block, x = nn.Sequential(nn.Linear(8, 1777), nn.Softmax(-1), nn.Linear(1777, 8)), torch.randn(5, 8, requires_grad=True)
    count = lambda: sum(type(o) is torch.Tensor and o.shape == (5, 1777) for o in gc.get_objects())
    gc.collect()
    gc.disable()
    try:
        out = checkpoint(block, x)
        assert count() == 0
        out.sum().backward(retain_graph=True)
        assert count() == 0  # handed out once
        torch.autograd.grad(out.sum(), [block[2].bias])  # needs no saved tensor
        out = checkpoint(block, x)
        torch.autograd.grad(out.sum(), [block[2].weight])
        del out
        assert count() == 0
        out = checkpoint(lambda t: (block[:2](t) * 1, t.exp())[1], x)  # saves what belongs to a branch that is thrown away
        out.sum().backward(retain_graph=True)
        assert count() == 0
    finally:
        gc.enable()


# Segments


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 40))
def test_segments_cut_and_the_best_one_is_the_best(n, size, ratio):
    parts = segments(n, size)
    assert [k for part in parts for k in part] == list(range(n)) and all(len(p) == size for p in parts[:-1]) and 1 <= len(parts[-1]) <= size
    best = best_segment(n, ratio, 1)
    assert all(segment_peak(n, best, ratio, 1) <= segment_peak(n, s, ratio, 1) for s in range(1, n + 1))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_segments_and_halves_give_the_same_gradients(n):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Dropout(0.3)) for _ in range(n))
    x, out = torch.randn(3, 7, requires_grad=True), []

    def straight(blocks, x):
        for block in blocks:
            x = block(x)
        return x
    for run in (straight, run_recursively, *(partial(run_segments, size=s) for s in (1, 2, 3, 8))):
        torch.manual_seed(4)
        out.append(torch.autograd.grad(run(blocks, x).sum(), [x, *blocks.parameters()]))
    assert all(same(out[0], other) for other in out)


# In models


def families():
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

    small = dict(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=8, max_position_embeddings=64, pad_token_id=0, attention_dropout=0.2)
    return {"llama": LlamaConfig(**small), "qwen3": Qwen3Config(**small), "gemma2": Gemma2Config(**small, sliding_window=4),
            "gemma3": Gemma3TextConfig(**small, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2),
            "gpt2": GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=4, n_head=4, n_positions=64)}, AutoModelForCausalLM


def step_of(m, batch=BATCH, seed=3, context=nullcontext):
    torch.manual_seed(seed)
    m.zero_grad()
    with context():
        loss = lm_loss(m, batch)
    loss.backward()
    return [loss.detach(), torch.rand(2), *grads(m).values()]


@pytest.mark.parametrize("family, attention", [
    *itertools.product(["llama", "qwen3", "gemma3", "gpt2"], ["eager", "sdpa"]), ("gemma2", "eager"),  # the Gemmas mix two kinds of masks
])
def test_blocks_of_many_families_give_the_same_bits(family, attention):
    configs, auto = families()
    torch.manual_seed(0)
    m = auto.from_config(configs[family], attn_implementation=attention).train()
    before = step_of(m)
    kept = saved_bytes(lm_loss, m, BATCH, exclude=[m])
    for mode in ("full", "selective", 2, "3", "none"):
        checkpoint_blocks(m, mode)
        assert same(before, step_of(m)), mode
        if mode in ("full", 2, "3"):
            assert saved_bytes(lm_loss, m, BATCH, exclude=[m]) < 0.4 * kept
    m.activation_checkpointing_enable()
    assert same(before, step_of(m))
    with pytest.raises(ValueError, match="the library's own checkpointing is on"):
        checkpoint_blocks(m)


@pytest.mark.parametrize("mode", ["full", 2, "selective"])
@pytest.mark.parametrize("kind", ["own adapters", "peft", "four bits"])
def test_adapters_with_a_frozen_embedding(kind, mode):
    m = model(n_layers=3)
    torch.manual_seed(0)
    if kind == "peft":
        from peft import LoraConfig, get_peft_model
        m = get_peft_model(m, LoraConfig(r=3, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    else:
        if kind == "four bits":
            from llm_train_course.qlora import quantize_model
            quantize_model(m)
        add_lora(m, 3, 8, dropout=0.2)
    for n, p in m.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.1)
    m.train()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    for context in (nullcontext, autocast):
        checkpoint_blocks(m, "none")
        before = step_of(m, LEFT, context=context)
        checkpoint_blocks(m, mode)
        assert len(before) > 4 and same(before, step_of(m, LEFT, context=context))


def test_smollm2_with_adapters():
    pytest.importorskip("gguf")
    from llm_train_course.core import load_model
    m, tok = load_model("smollm2")
    add_lora(m, 4, 8, targets=["q_proj", "v_proj"])
    ids = tok("What does a checkpoint keep?", return_tensors="pt").input_ids
    batch = {"input_ids": ids, "labels": ids}
    before, kept = step_of(m, batch), saved_bytes(lm_loss, m, batch, exclude=[m])
    checkpoint_blocks(m, 5)
    assert same(before, step_of(m, batch)) and saved_bytes(lm_loss, m, batch, exclude=[m]) < 0.1 * kept


def test_caches_generation_and_evaluation_are_left_alone():
    m = model(n_layers=3)
    plain = generate(m, TOKENIZER, ["Ada Moss"], max_new_tokens=6)
    for mode in ("full", 2, "selective"):
        checkpoint_blocks(m, mode)
        assert generate(m, TOKENIZER, ["Ada Moss"], max_new_tokens=6) == plain
        ids = BATCH["input_ids"][:2, :5]
        m.eval()
        with_graph = m(ids, use_cache=True)  # with a graph and a cache: not run again
        with_graph.logits.sum().backward()
        assert with_graph.past_key_values.get_seq_length() == 5
        m.train()
        out = m(ids, labels=ids)  # a loop that leaves use_cache at its default
        out.loss.backward()
        if mode != "selective":
            assert out.past_key_values is None or out.past_key_values.get_seq_length() == 0


def test_a_copy_and_a_pickle_are_models_of_their_own():
    m = checkpoint_blocks(model(n_layers=3), 2)
    keys = list(m.state_dict())
    step_of(m)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        assert list(other.state_dict()) == keys == list(model(n_layers=3).state_dict())
        fresh = model(n_layers=3)
        fresh.load_state_dict(other.state_dict())
        assert torch.equal(lm_loss(other, BATCH), lm_loss(fresh, BATCH)) and not torch.equal(lm_loss(m, BATCH), lm_loss(other, BATCH))
    checkpoint_blocks(m, "none")
    assert all("forward" not in block.__dict__ for block in decoder_blocks(m))


def test_a_forward_method_that_was_there_is_put_back_and_an_error_leaves_nothing_behind():
    m, noted = model(n_layers=2), []
    block = decoder_blocks(m)[0]
    original = block.forward

    def noisy(*args, **kwargs):
        noted.append(1)
        if len(noted) == 3:
            raise OSError("disk")
        return original(*args, **kwargs)
    block.forward = noisy
    plain = step_of(m)
    checkpoint_blocks(m, 2)
    with pytest.raises(OSError, match="disk"):
        step_of(m)  # its second run
    assert same(plain, step_of(m))
    checkpoint_blocks(m, "none")
    assert block.forward is noisy


def test_what_stands_between_two_blocks_is_not_skipped():
    m = model(n_layers=4)
    m.model.layers[2].register_forward_pre_hook(lambda block, args, kwargs: ((args[0] * 1.5, *args[1:]), kwargs), with_kwargs=True)
    before = step_of(m)
    for mode in (2, 3, 4):
        assert same(before, step_of(checkpoint_blocks(m, mode))), mode


def test_a_change_in_place_between_two_blocks_is_not_skipped():
    m, shift = model(n_layers=4), torch.linspace(-1, 1, 7).repeat(100)
    m.model.layers[1].register_forward_hook(lambda block, args, out: out.add_(shift[: out.shape[-1]]))
    before = step_of(m)
    for mode in ("full", 2, 3, 4, "selective"):
        assert same(before, step_of(checkpoint_blocks(m, mode))), mode


def test_an_interrupted_forward_pass_leaves_a_model_that_can_be_copied():
    m = model(n_layers=2)
    second = decoder_blocks(m)[1]
    stop = second.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(OSError("stop")))
    checkpoint_blocks(m, 2)
    with pytest.raises(OSError, match="stop"):
        lm_loss(m, BATCH)
    stop.remove()
    assert same(step_of(copy.deepcopy(m)), step_of(m))


def test_a_block_that_fails_leaves_no_graph_behind():
    m = model(n_layers=2)
    mlp = decoder_blocks(m)[1].mlp
    checkpoint_blocks(m, 2)
    stop = mlp.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        lm_loss(m, BATCH)
    segment = decoder_blocks(m)[0].forward.segment
    assert segment.frame is None and segment.last is None
    stop.remove()
    after = step_of(m)
    assert same(after, step_of(checkpoint_blocks(m, "none")))


@pytest.mark.parametrize("mode, message", [("half", "'half'"), ("²", "'²'"), (0, "got 0"), (True, "got True"), (-1, "got -1"), ("", "got ''"), (1.5, "got 1.5")])
def test_modes_that_are_refused(mode, message):
    with pytest.raises(ValueError, match=f"mode must be none, full, selective or a number of blocks, .*{message}"):
        checkpoint_blocks(model(), mode)


def test_selective_refuses_flash_and_what_has_no_blocks():
    m = model()
    m.config._attn_implementation_internal = "flash_attention_2"
    checkpoint_blocks(m, 2)
    with pytest.raises(ValueError, match="selective recomputation is for eager and sdpa attention, not flash_attention_2"):
        checkpoint_blocks(m, "selective")
    assert all("forward" in block.__dict__ for block in decoder_blocks(m))  # the mode before is still on
    with pytest.raises(ValueError, match="Sequential has no blocks that can be checkpointed"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2)), "full")


def fit_on_rank(rank, folder):
    for mode in ("none", "full", 2, "selective"):
        m = checkpoint_blocks(model(n_layers=3, attention_dropout=0.1), mode)
        config = TrainConfig(learning_rate=3e-3, max_steps=4, grad_accum_steps=2, epochs=9, progress=False, cpu=True)
        fit(m, PaddedBatches(ROWS, 2, TOKENIZER.pad_token_id), config=config)
        torch.save(flat(m), Path(folder) / f"{mode}_{rank}.pt")


def test_fit_on_two_ranks_gives_the_same_bits(tmp_path):
    on_two_ranks(fit_on_rank, tmp_path, "fork")
    weights = {p.stem: torch.load(p) for p in tmp_path.glob("*.pt")}
    assert len(weights) == 8 and all(torch.equal(w, weights["none_0"]) for w in weights.values())


def test_a_resumed_run_may_switch_the_mode(tmp_path):
    config = TrainConfig(learning_rate=3e-3, max_steps=6, save_every=3, epochs=9, progress=False, cpu=True)
    layout = lambda: PaddedBatches(ROWS, 3, TOKENIZER.pad_token_id)
    straight = checkpoint_blocks(model(attention_dropout=0.1), "full")
    fit(straight, layout(), config=config)
    seen = []

    def stops(m, batch):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return lm_loss(m, batch)
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint_blocks(model(attention_dropout=0.1), 2), layout(), stops, config, run_dir=tmp_path)
    second = model(attention_dropout=0.1)
    fit(second, layout(), config=config, run_dir=tmp_path, resume=True)
    assert torch.equal(flat(straight), flat(second))


def test_fit_in_bf16_autocast_gives_the_same_bits():
    weights = []
    for mode in ("none", "full", 2, "selective"):
        m = checkpoint_blocks(model(n_layers=2, attention_dropout=0.1), mode)
        fit(m, PaddedBatches(ROWS, 3, TOKENIZER.pad_token_id), config=TrainConfig(learning_rate=3e-3, max_steps=3, precision="bf16", progress=False, cpu=True))
        weights.append(flat(m))
    assert all(torch.equal(w, weights[0]) for w in weights)


# The peak


def tracked(step, *existing):
    from torch.distributed._tools.mem_tracker import MemTracker
    tracker = MemTracker()
    tracker.track_external(*existing)
    with tracker:
        step()
    return sum(n for parts in tracker.get_tracker_snapshot("peak").values() for kind, n in parts.items() if kind == "Total")


@pytest.mark.parametrize("mode", ["none", "full", 2, "selective"])
def test_the_peak_is_mem_tracker_s(mode):
    out = []
    for measure in (tracked, lambda *a: peak_bytes(*a)["total"]):
        m, ids = checkpoint_blocks(model(n_layers=3, attn_implementation="eager"), mode), BATCH["input_ids"]
        optimizer = torch.optim.AdamW(m.parameters(), fused=True)

        def step(m=m, optimizer=optimizer):
            lm_loss(m, BATCH).backward()
            optimizer.step()
        out.append(measure(step, m, optimizer, ids))
    assert out[0] == out[1]
    parts = peak_bytes(step, m, optimizer, ids)  # a second step, with states; the parts sum up to the total
    assert parts["total"] == sum(n for kind, n in parts.items() if kind != "total")
    assert parts["weights"] == sum(p.nbytes for p in m.parameters()) and parts["optimizer"] >= 2 * parts["weights"]


@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_peak_is_what_the_allocator_gave_out(mode):
    m = checkpoint_blocks(tiny_llama(64, hidden_size=64, n_layers=4, attn_implementation="eager"), mode)
    ids = torch.randint(2, 64, (2, 48))
    step = lambda: F.cross_entropy(m(ids, use_cache=False).logits.flatten(0, 1), ids.flatten()).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    m.zero_grad()
    level = highest = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    there = sum(t.nbytes for t in [*m.parameters(), *m.buffers(), ids])
    assert abs(highest / (peak_bytes(step, m, ids)["total"] - there) - 1) < 0.02


# Offloading


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("mode", ["none", "full", 2, "selective"])
def test_offloading_gives_the_same_bits(mode, place, device, tmp_path):
    m = checkpoint_blocks(model(n_layers=3, attention_dropout=0.1).to(device), mode).train()
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in LEFT.items()}
    where = "cpu" if place == "cpu" else tmp_path
    before = step_of(m, batch)
    torch.manual_seed(3)
    m.zero_grad()
    with offload_activations(where, min_bytes=0, exclude=[m]) as moved:
        loss = lm_loss(m, batch)
    torch.rand(2)
    loss.backward()
    assert same(before[2:], list(grads(m).values())) and moved.n_tensors > 5
    assert not list(tmp_path.iterdir())


def test_what_is_moved_and_what_stays(tmp_path):
    x = torch.randn(40, 30, requires_grad=True)
    layer = nn.Linear(30, 30)
    cases = {
        "a weight": (lambda t: layer(t), 40 * 30 * 4), "three times the same": (lambda t: layer(t) + layer(t) + t * t, 40 * 30 * 4),
        "a transposed and a reshaped view": (lambda t: (lambda h: (h.T.exp().sum() + (h.reshape(-1) * h.reshape(-1)).sum()))(t * 2), 2 * 40 * 30 * 4),
        "a slice": (lambda t: (t[:, ::2] * t[:, ::2]).sum(), 40 * 15 * 4), "an expanded view": (lambda t: t * torch.ones(30, requires_grad=True).expand(40, 30), 40 * 30 * 4),
    }  # fmt: skip
    for name, (fn, n_bytes) in cases.items():
        with offload_activations(tmp_path, min_bytes=0) as moved:
            out = fn(x)
        assert moved.n_bytes == n_bytes, name
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(fn(x).sum(), x)[0]), name
    with offload_activations() as moved:
        layer(x).sum().backward()
    assert moved.n_bytes == 0  # smaller than a mebibyte


def test_a_tensor_changed_in_place_is_another_tensor():
    x = torch.arange(4.0, requires_grad=True)
    with offload_activations(min_bytes=0) as moved:
        h = x * 1
        first = h * torch.ones(4, requires_grad=True)  # saves h as it is
        h.data.add_(0)  # autograd does not see this one
        with torch.no_grad():
            h.add_(10)
        second = h * h
    assert moved.n_tensors >= 2
    assert torch.equal(torch.autograd.grad(second.sum(), h)[0], 2 * (torch.arange(4.0) + 10)) and first.requires_grad


def test_a_tensor_that_stayed_and_was_changed_in_place_is_noticed_as_by_autograd():
    for context, error in ((nullcontext, "modified by an inplace operation"), (offload_activations, "a tensor that stayed has been modified by an inplace operation")):
        x = torch.ones(2, requires_grad=True)
        with context():
            h = x * 2
            y = (h * h).sum()
        with torch.no_grad():
            h.mul_(100)
        with pytest.raises(RuntimeError, match=error):
            y.backward()
    x = torch.ones(2, requires_grad=True)
    with offload_activations():
        (F.relu(x * 2, inplace=True) * 3).sum().backward()  # an operation in place that autograd allows
    assert x.grad.tolist() == [6.0, 6.0]


def test_copies_of_trained_weights_that_autocast_makes_stay():
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    net, x = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4, bias=False)), torch.randn(5, 6)
    with bfloat16(), offload_activations(min_bytes=0) as moved:
        y = net(x)
    copies = 2 * 10 * 4  # of the second weight: x needs no gradient, so the first is not saved
    with bfloat16():
        assert moved.n_bytes == saved_bytes(net, x) - copies == 2 * (5 * 6 + 5 * 10)  # the copy of x, the result of tanh
        plain = torch.autograd.grad(net(x).sum(), [*net.parameters()])
    assert same(plain, torch.autograd.grad(y.sum(), [*net.parameters()]))
    net[2].requires_grad_(False)  # a copy of a frozen weight cannot be told from an activation: it is moved
    with bfloat16(), offload_activations(min_bytes=0) as moved:
        y = net(x)
    assert moved.n_bytes == 2 * (5 * 6 + 5 * 10) + 2 * 10 * 4


def test_no_folder_no_offload():
    with pytest.raises(FileNotFoundError, match="no such folder to move activations to: /no/such"), offload_activations("/no/such"):
        pass


# The step inside the backward pass


def optimizers():
    import bitsandbytes.optim
    return {"adamw": partial(torch.optim.AdamW, fused=True), "foreach": partial(torch.optim.AdamW, foreach=True), "sgd": partial(torch.optim.SGD, momentum=0.9),
            "adamw_8bit": bitsandbytes.optim.AdamW8bit}


@pytest.mark.parametrize("kind", ["adamw", "foreach", "sgd", "adamw_8bit"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_step_inside_is_the_step_after(kind, mode):
    out = []
    for inside in (False, True):
        m = checkpoint_blocks(tiny_llama(len(TOKENIZER), hidden_size=64, n_layers=2), mode)
        m.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
        unused = nn.Parameter(torch.ones(3))
        groups = [{"params": [p for p in m.parameters() if p.requires_grad and (p.ndim > 1) == wide] + [unused] * wide, "weight_decay": 0.1 * wide} for wide in (True, False)]
        optimizer = optimizers()[kind](groups, lr=1e-3)
        with step_in_backward(optimizer) if inside else nullcontext():
            for k in range(4):
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2 / (k + 1)
                (lm_loss(m, BATCH) / BATCH["n_targets"]).backward()
                if not inside:
                    optimizer.step()
                    optimizer.zero_grad()
                assert not grads(m)
        assert torch.equal(unused, torch.ones(3)) and unused.grad is None
        out.append([*m.parameters(), *[v for p in m.parameters() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]])
        assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in groups]
    assert same(*out)


def test_the_step_inside_ends_with_its_context_and_refuses_old_gradients():
    m = model()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    before = flat(m)
    with step_in_backward(optimizer):
        pass
    lm_loss(m, LEFT).backward()
    assert torch.equal(flat(m), before) and grads(m)
    with pytest.raises(ValueError, match=rf"{len(grads(m))} parameters have gradients already: zero_grad\(\) first"), step_in_backward(optimizer):
        pass

    class Failing(torch.optim.SGD):
        def step(self):
            raise OSError("no")
    m.zero_grad()
    failing = Failing(m.parameters(), lr=0.1)
    with pytest.raises(OSError), step_in_backward(failing):
        lm_loss(m, LEFT).backward()
    assert len(failing.param_groups) == 1 and len(failing.param_groups[0]["params"]) == len(list(m.parameters()))


def test_gradients_do_not_exist_at_once():
    peaks = []
    for inside in (False, True):
        m = checkpoint_blocks(tiny_llama(64, hidden_size=128, n_layers=4, tie_embeddings=False), "full")
        optimizer, ids = torch.optim.AdamW(m.parameters(), fused=True), torch.randint(2, 64, (1, 8))
        for p in m.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()

        def step(m=m, optimizer=optimizer, inside=inside, ids=ids):
            with step_in_backward(optimizer) if inside else nullcontext():
                m(ids, use_cache=False).logits.sum().backward()
            optimizer.step()
        peaks.append(peak_bytes(step, m, optimizer, ids))
    assert peaks[0]["gradients"] > 0.7 * peaks[0]["weights"] and peaks[1]["gradients"] < 0.2 * peaks[1]["weights"] and peaks[1]["total"] < peaks[0]["total"]


# Eight-bit Adam


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=4), st.sampled_from(["adamw", "adamw_8bit"]))
def test_adam_s_states_have_the_bytes_that_are_derived(sizes, kind):
    params = [nn.Parameter(torch.randn(n)) for n in sizes]
    optimizer = optimizers()[kind](params, lr=1e-3)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
    assert sum(storages.values()) == adam_bytes(sizes, kind)


def test_adam_bytes_refuses():
    with pytest.raises(ValueError, match="kind must be adamw or adamw_8bit, got 'lion'"):
        adam_bytes([3], "lion")


@cuda
def test_checkpointing_lowers_the_peak_that_cuda_reports():
    peaks = {}
    for mode in ("none", "full"):
        m = checkpoint_blocks(tiny_llama(64, hidden_size=256, n_layers=8).cuda(), mode)
        ids = torch.randint(2, 64, (8, 256), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        lm_loss(m, {"input_ids": ids, "labels": ids}).backward()
        peaks[mode] = torch.cuda.max_memory_allocated()
    assert peaks["full"] < 0.6 * peaks["none"]
