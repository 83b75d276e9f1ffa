"""ZeRO against AdamW on one process, and against DeepSpeed."""

import gc
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm_train_course.core import tiny_llama
from llm_train_course.parallel import CommCounter, Ranks, ZeroAdamW, zero_bytes_per_rank


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, timeout_s=30) as r:
        yield r


# The formula

@given(st.integers(0, 10**12), st.integers(1, 5000), st.integers(0, 3))
def test_formula(n_params, world_size, stage):
    got = zero_bytes_per_rank(n_params, world_size, stage)
    assert got == pytest.approx(n_params * (16, 4 + 12 / world_size, 2 + 14 / world_size, 16 / world_size)[stage], rel=1e-12)
    padded = zero_bytes_per_rank(n_params, world_size, stage, padded=True)
    assert isinstance(padded, int) and got <= padded <= got + 16 * world_size
    if stage:
        assert got <= zero_bytes_per_rank(n_params, world_size, stage - 1)
    # all ranks of stage 3 together hold the states once; plain data parallel holds them on each rank
    assert zero_bytes_per_rank(n_params * world_size, world_size, 3) * world_size == 16 * n_params * world_size


def test_formula_is_exact_where_floats_are_not():
    n = 2**55 + 64
    assert zero_bytes_per_rank(n, 64, 3) == n // 4 and isinstance(zero_bytes_per_rank(n, 64, 3), int)
    assert zero_bytes_per_rank(100, 4, 1, k=8, low_bytes=4) == 800 + 200    # fp32 training: no master copy


@pytest.mark.parametrize("bad", [(10, 2, 4), (10, 0, 1), (-1, 2, 1), (10, 2, True + 3)])
def test_formula_refuses(bad):
    with pytest.raises(ValueError, match="must"):
        zero_bytes_per_rank(*bad)


# Equality with torch, to the bit: gradients are small integers, so that their sum has no rounding on four ranks either

SHAPES = ((3, 5), (), (1,), (7,), (2, 2, 3), (11,))


class Bag(nn.Module):
    "Parameters of odd shapes in a list of small modules; `use(step, ...)` gives each an integer gradient."

    def __init__(self, shapes, dtypes, frozen):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            part = nn.Module()
            part.w = nn.Parameter(torch.randn(shape, generator=g).to(dtype), requires_grad=i not in frozen)
            part.forward = lambda factor, part=part: (part.w * factor).sum().double()
            self.add_module(f"part{i}", part)

    def forward(self, step, rank, skip):
        total = 0.0
        for i, part in enumerate(self.children()):
            if (step, i) not in skip and (rank, i) not in skip:
                g = torch.Generator().manual_seed(1000 * step + 10 * rank + i)
                total = total + part(torch.randint(-4, 5, part.w.shape, generator=g).to(part.w.dtype))
        return total


def bag_weights(optimizer, model):
    if getattr(optimizer, "stage", 0) == 3:
        with optimizer.gathered():
            return [p.detach().clone() for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()]


def bag_groups(model, decays):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p, d in zip(trained, decays, strict=False) if d == value], "weight_decay": value} for value in set(decays)]
    return [g for g in groups if g["params"]]


def train_bag(case, stage, offload=False):
    shapes, dtypes, frozen, decays, skip, bucket = case
    model = Bag(shapes, dtypes, frozen)
    zero = ZeroAdamW(bag_groups(model, decays), stage, lr=0.05, betas=(0.8, 0.9), module=model, bucket_numel=bucket, offload=offload)
    for step in range(3):
        loss = model(step, dist.get_rank(), skip)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.backward()
        zero.step()
    return bag_weights(zero, model)


def bag_alone(case, world_size=4):
    shapes, dtypes, frozen, decays, skip, _ = case
    model = Bag(shapes, dtypes, frozen)
    optimizer = torch.optim.AdamW(bag_groups(model, decays), lr=0.05, betas=(0.8, 0.9), foreach=False)
    for step in range(3):
        for rank in range(world_size):
            loss = model(step, rank, skip)
            if isinstance(loss, torch.Tensor) and loss.requires_grad:
                loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= world_size
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@st.composite
def bags(draw, same_on_all_ranks=False):
    n = draw(st.integers(1, 6))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=n, max_size=n))
    dtypes = draw(st.lists(st.sampled_from((torch.float32, torch.float64)), min_size=n, max_size=n))
    frozen = draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    decays = draw(st.lists(st.sampled_from((0.0, 0.3)), min_size=n, max_size=n))
    # (a, i): parameter i is left out in step a, and by rank a. Step 3 does not exist, so (3, i) concerns a rank only
    skip = draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, n - 1)), max_size=4))
    if same_on_all_ranks:
        skip = set()
    return shapes, dtypes, frozen, decays, skip, draw(st.sampled_from((1, 8, 1000)))


F32, F64 = torch.float32, torch.float64
# 0, 2 and 5 share a unit: 2 has no gradient in step 0 and none on rank 0, 5 none on rank 3; 3 none in step 1 and on rank 1
HARD = (list(SHAPES), [F32, F32, F32, F64, F32, F32], {1}, [0.3, 0.0, 0.3, 0.3, 0.0, 0.3], {(0, 2), (1, 3), (3, 5)}, 1000)


@settings(max_examples=6, deadline=None)
@example(case=HARD, stage=1, offload=False)
@example(case=HARD, stage=2, offload=True)
@given(case=bags(), stage=st.sampled_from((1, 2)), offload=st.booleans())
def test_bits_of_any_bag_of_parameters(ranks, case, stage, offload):
    "Fewer numbers than ranks, scalars, frozen ones, two dtypes, groups, parameters that a rank or a step leaves out; stage 2 needs a backward pass on each rank."
    if stage == 2 and any((a, i) in case[4] for i in range(len(case[0])) for a in range(4)):
        case = (*case[:2], case[2] - {0}, case[3], {(a, i) for a, i in case[4] if i}, case[5])    # the first parameter is used everywhere
    alone = bag_alone(case)
    for result in ranks(train_bag, case, stage, offload):
        assert all(torch.equal(a, b) for a, b in zip(alone, result, strict=True))


@settings(max_examples=5, deadline=None)
@given(case=bags(same_on_all_ranks=True), offload=st.booleans())
def test_bits_of_any_bag_in_stage_3(ranks, case, offload):
    alone = bag_alone(case)
    for result in ranks(train_bag, case, 3, offload):
        assert all(torch.equal(a, b) for a, b in zip(alone, result, strict=True))


# A Llama, two groups of two ranks at once

def pair():
    "The group of two that this rank is in, and its number there."
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return groups[dist.get_rank() // 2], dist.get_rank() % 2


def llama(dtype=torch.float32, tied=True, seed=0):
    return tiny_llama(37, hidden_size=12, n_heads=3, n_kv_heads=1, n_layers=2, intermediate_size=19, tie_embeddings=tied, seed=seed).to(dtype)


def ids_of(rank, step=0, micro=0):
    return torch.randint(2, 37, (2, 7), generator=torch.Generator().manual_seed(97 * step + 13 * micro + rank))


def loss_of(model, ids):
    return F.cross_entropy(model(ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def train_llama(stage, tied, recompute=False, schedule=False, steps=3, **kw):
    group, rank = pair()
    model = llama(tied=tied)
    if recompute:
        model.train().gradient_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
    zero = ZeroAdamW(model, stage, lr=0.01, weight_decay=0.1, group=group, bucket_numel=700, **kw)
    scheduler = torch.optim.lr_scheduler.LambdaLR(zero, lambda t: 1 / (1 + t)) if schedule else None
    for step in range(steps):
        loss_of(model, ids_of(rank, step)).backward()
        zero.step()
        if schedule:
            scheduler.step()
    return bag_weights(zero, model), zero.grad_norm


def llama_alone(tied, schedule=False, max_norm=None, steps=3):
    model, norm = llama(tied=tied), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for step in range(steps):
        for rank in range(2):
            (loss_of(model, ids_of(rank, step)) / 2).backward()
        if max_norm:
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()], norm


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_llama_on_pairs_of_ranks(ranks, stage):
    for tied, recompute, schedule in ((True, False, True), (False, True, False), (True, "reentrant", False)):
        alone = llama_alone(tied, schedule)[0]
        for weights, _ in ranks(train_llama, stage, tied, recompute, schedule):
            assert all(torch.equal(a, b) for a, b in zip(alone, weights, strict=True))


def train_clipped(stage):
    return train_llama(stage, True, max_norm=0.3)


@pytest.mark.parametrize("stage", [1, 3])
def test_clipping_sees_the_norm_of_all_shards(ranks, stage):
    alone, norm = llama_alone(True, max_norm=0.3)
    assert norm > 0.6    # it does clip
    for weights, ours in ranks(train_clipped, stage):
        assert ours == pytest.approx(norm, rel=1e-6)
        assert max(float((a - b).abs().max()) for a, b in zip(alone, weights, strict=True)) < 1e-5    # 1/1000 of a step


def nan_on_rank_2(stage):
    model = llama()
    zero = ZeroAdamW(model, stage, max_norm=1.0)
    (loss_of(model, ids_of(dist.get_rank())) * (float("nan") if dist.get_rank() == 2 else 1)).backward()
    zero.step()
    return zero.grad_norm, any(bool(p.isnan().any()) for p in bag_weights(zero, model))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_nan_of_one_rank_is_seen_by_all(ranks, stage):
    assert all(norm != norm and spoiled for norm, spoiled in ranks(nan_on_rank_2, stage))


def left_behind(stage):
    "After zero_grad nothing of a backward pass is left; a sum instead of a mean; start weights come from the group's first rank."
    model = llama(seed=dist.get_rank())
    zero = ZeroAdamW(model, stage, lr=0.01, average=False)
    start = bag_weights(zero, model)
    loss_of(model, ids_of(7)).backward()
    zero.zero_grad()
    zero.step()
    untouched = all(torch.equal(a, b) for a, b in zip(start, bag_weights(zero, model), strict=True))
    same = all(torch.equal(a, b) for a, b in zip(start, [p.detach() for p in llama(seed=0).parameters()], strict=True))
    loss_of(model, ids_of(7)).backward()
    zero.step(), zero.step()    # the second has no gradient: nothing happens
    return untouched, same, bag_weights(zero, model)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_grad_sum_and_start(ranks, stage):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    for _ in range(4):
        loss_of(model, ids_of(7)).backward()    # four equal ranks, summed
    optimizer.step()
    for untouched, same, weights in ranks(left_behind, stage):
        assert untouched and same
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, model.parameters(), strict=True))


def small_summands(grad_dtype):
    w = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    zero = ZeroAdamW([w], 2, betas=(0.5, 0.5), grad_dtype=grad_dtype)
    for _ in range(2):
        (w * (256.0 if dist.get_rank() == 0 else 1.0)).sum().backward()
    zero.step()
    return zero.trained[0].exp_avg[0].item()


def test_gradients_are_summed_in_the_dtype_that_is_asked_for(ranks):
    "256 + 1 is 256 in bf16. In fp32, 2 · (256 + 3) / 4 · ½ is left in the moment."
    assert ranks(small_summands, torch.float32)[0] == 2 * 259 / 4 / 2
    assert ranks(small_summands, None)[0] != 2 * 259 / 4 / 2


# Memory and traffic

def storages():
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    with torch._C.DisableTorchFunctionSubclass():
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided and t.device.type == "cpu"}


def bytes_and_traffic(stage, k):
    model = llama(torch.bfloat16, tied=False)
    ids = [ids_of(dist.get_rank(), 0, i) for i in range(k)]
    before = storages().keys() - {p.untyped_storage().data_ptr() for p in model.parameters()}
    n = sum(p.numel() for p in model.parameters())
    zero, buffered = ZeroAdamW(model, stage, bucket_numel=500), [0]
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: buffered.append(sum(u.buffer.numel() for u in zero.units if u.buffer is not None)))
    with CommCounter() as c:
        for part in ids:
            loss_of(model, part).backward()
        held = sum(size for address, size in storages().items() if address not in before)
        zero.step()
    padded = sum(zero_bytes_per_rank(u.offsets[-1], 4, stage, padded=True) for u in zero.units)
    whole = 2 * sum(u.k * 4 for u in zero.units)
    return n, held, padded, c.payload_bytes["reduce_scatter"] / whole, c.payload_bytes["all_gather"] / whole, max(buffered) / n


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3])
def test_bytes_and_traffic(ranks, stage, k):
    for n, held, padded, reduced, gathered, buffered in ranks(bytes_and_traffic, stage, k):
        assert zero_bytes_per_rank(n, 4, stage) <= held <= padded + 2    # 2: the NaN of the placeholders
        embedding = 37 * 12 / n
        assert reduced == (1 if stage == 1 else k)
        assert gathered == (1 if stage < 3 else pytest.approx(k * (2 - embedding), rel=0.01))
        assert (stage == 2) <= (buffered > 0) and (stage == 1 or buffered < 0.5)    # whole gradients do not pile up


# Stage 3

def misuse():
    model = llama()
    ZeroAdamW(model, 3)    # its hooks keep it
    said = []
    weight = model.lm_head.weight
    for use in (lambda: weight + 1, lambda: F.linear(torch.ones(1, 12), weight), lambda: weight.data.sum(), lambda: model.state_dict(),
                lambda: torch.stack([weight]), lambda: weight.fill_(0), lambda: weight.detach().numpy(), lambda: model.to(torch.bfloat16)):
        try:
            use()
            said.append("computed")
        except RuntimeError as e:
            said.append(str(e))
    return said, (tuple(weight.shape), weight.dtype, weight.requires_grad, weight.numel(), isinstance(weight, nn.Parameter)), repr(weight)


def test_a_partitioned_weight_refuses(ranks):
    said, known, shown = ranks(misuse)[0]
    assert all("embed_tokens.weight is partitioned by ZeRO stage 3" in s and "gathered()" in s for s in said)
    assert known == ((37, 12), torch.float32, True, 37 * 12, True) and "partitioned" in shown


class Twice(nn.Module):
    "One layer used twice, one whose forward raises on demand, a weight used by the parent, an output that is a dictionary."

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer, self.own = nn.Linear(5, 5), nn.Parameter(torch.randn(5))
            self.norm = nn.LayerNorm(5)

    def forward(self, x, fail=False):
        x = self.norm(self.layer(self.layer(x).tanh()) * self.own)
        if fail:
            raise KeyError("on purpose")
        return {"out": x * self.own}


def strange_uses(recompute):
    model = Twice()
    zero = ZeroAdamW(model, 3, lr=0.1)
    x = torch.linspace(-1, 1, 15).view(3, 5)
    try:
        model(x, fail=True)
        return "did not raise"
    except KeyError:
        closed = all("partitioned" in repr(p) for p in model.parameters())
    with torch.no_grad():
        evaluated = model(x)["out"]
    out = checkpoint(lambda t: model(t)["out"], x, use_reentrant=False) if recompute else model(x)["out"]
    out.square().sum().backward()
    zero.step()
    return closed, evaluated, all("partitioned" in repr(p) for p in model.parameters()), zero._last, bag_weights(zero, model)


@pytest.mark.parametrize("recompute", [False, True])
def test_modules_that_are_used_in_odd_ways(ranks, recompute):
    model = Twice()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    out = model(torch.linspace(-1, 1, 15).view(3, 5))["out"]
    out.square().sum().backward()
    optimizer.step()
    for closed, evaluated, closed_again, last, weights in ranks(strange_uses, recompute):
        assert closed and closed_again and last is None and torch.equal(evaluated, out)
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


# Checkpoints

def checkpoint_tour(folder, tour):
    "Trains on four ranks, then loads and saves with each (ranks, stage) of the tour; returns the weights before, and after the last load."
    groups = {n: [dist.new_group(list(range(s, s + n))) for s in range(0, 4, n)][dist.get_rank() // n] for n in (1, 2, 4)}
    def new(stage, n, seed):
        model = llama(torch.bfloat16, seed=seed)
        return model, ZeroAdamW([{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}, {"params": [p for p in model.parameters() if p.dim() > 1], "lr": 0.02}],
                                stage, group=groups[n], module=model, bucket_numel=300 * stage)
    model, zero = new(2, 4, 0)
    for step in range(2):
        loss_of(model, ids_of(dist.get_rank(), step)).backward()
        zero.step()
    zero.param_groups[0]["lr"] = 0.125
    zero.save(f"{folder}/0")
    before = bag_weights(zero, model)
    for i, (n, stage) in enumerate(tour):
        if dist.get_rank() < n:
            model, zero = new(stage, n, 5)
            zero.load(f"{folder}/{i}")
            zero.save(f"{folder}/{i + 1}")
        dist.barrier()
    return before, bag_weights(zero, model), zero.param_groups[0]["lr"], [u.steps for u in zero.trained]


def test_checkpoint_under_other_numbers_of_ranks(ranks, tmp_path):
    tour = [(2, 1), (1, 3), (4, 3), (1, 1), (2, 3), (4, 2)]
    for before, after, lr, steps in ranks(checkpoint_tour, str(tmp_path), tour):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and lr == 0.125
        assert {s for unit in steps for s in unit} == {2}
    first, last = (torch.load(tmp_path / f"{i}/zero-00003-of-00004.pt") for i in (0, len(tour)))    # moments and masters too, same layout
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, last, strict=True) for name in ("master", "exp_avg", "exp_avg_sq"))
    assert sum(t.numel() for unit in first for t in unit.values()) * 4 + 20_000 > (tmp_path / "0/zero-00003-of-00004.pt").stat().st_size    # no storage dragged along


def bad_checkpoints(folder):
    model = llama()
    zero, said = ZeroAdamW(model, 1), []
    def trial(do):
        try:
            do()
            said.append("accepted")
        except (ValueError, FileNotFoundError) as e:
            said.append(f"{type(e).__name__} {e}")
    zero.save(folder)
    state = zero.state_dict()
    zero.load_state_dict(state)    # its own is fine
    trial(lambda: zero.load_state_dict({**state, "rank": (dist.get_rank() + 1) % 4}))
    other = ZeroAdamW(nn.Linear(3, 3), 1)
    trial(lambda: other.load(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        Path(folder, "zero-00002-of-00004.pt").unlink()
    dist.barrier()
    trial(lambda: zero.load(folder))
    return said


def test_bad_checkpoints_are_refused_by_all_ranks(ranks, tmp_path):
    for said in ranks(bad_checkpoints, str(tmp_path)):
        assert "use save and load" in said[0] and "other parameters" in said[1] and "lacks zero-00002-of-00004.pt" in said[2]
    assert json.loads((tmp_path / "zero.json").read_text())["world_size"] == 4


# What is refused

def refusals():
    w = nn.Parameter(torch.ones(4))
    frozen_later = nn.Linear(2, 2)
    zero = ZeroAdamW(frozen_later, 1)
    frozen_later.weight.requires_grad_(False)
    sparse = nn.Embedding(5, 2, sparse=True)
    with_sparse = ZeroAdamW(sparse, 1)
    sparse(torch.tensor([1])).sum().backward()
    said = []
    for do in (lambda: ZeroAdamW([w], 0), lambda: ZeroAdamW([w], 1, lr=-1.0), lambda: ZeroAdamW([nn.Parameter(torch.ones(2, dtype=torch.float16))]),
               lambda: ZeroAdamW([w, nn.Parameter(w.data[1:3])]), lambda: ZeroAdamW([w], 3), lambda: ZeroAdamW([w], 3, module=nn.Linear(2, 2)),
               lambda: zero.add_param_group({"params": [w]}), zero.step, with_sparse.step):
        try:
            do()
            said.append("accepted")
        except ValueError as e:
            said.append(str(e))
    return said


def test_refusals_name_what_is_wrong(ranks):
    words = ("stage must be", "lr, eps", "float16", "same memory", "pass the module", "not in the module", "all param groups", "frozen after", "sparse gradient")
    for said in ranks(refusals):
        assert all(word in s for word, s in zip(words, said, strict=True)), said


# DeepSpeed

def load_deepspeed():
    import logging
    import warnings

    import deepspeed
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def with_deepspeed(stage, steps=2):
    k, model, losses = 2, llama(tied=False), []
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": k, "gradient_clipping": 0.4, "zero_allow_untested_optimizer": True,
              "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    engine = load_deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]
    for step in range(steps):
        for i in range(k):
            loss = loss_of(engine, ids_of(dist.get_rank(), step, i))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def without_deepspeed(stage, steps=2):
    k, model, losses = 2, llama(tied=False), []
    zero = ZeroAdamW(model, stage, lr=0.01, weight_decay=0.1, max_norm=0.4)
    for step in range(steps):
        for i in range(k):
            loss = loss_of(model, ids_of(dist.get_rank(), step, i))
            (loss / k).backward()
            losses.append(loss.item())
        zero.step()
    return losses


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_of_deepspeed(ranks, stage):
    theirs, ours = ranks(with_deepspeed, stage, 3), ranks(without_deepspeed, stage, 3)
    assert all(len(a) == 6 and a == pytest.approx(b, abs=5e-6) for a, b in zip(theirs, ours, strict=True))
    assert abs(theirs[0][0] - theirs[0][4]) > 1e-2    # the model does move


# A second save that was cut short


def half_saved(folder):
    "Saves twice; the second time rank 0 dies on the way. What loading says."
    model = torch.nn.Linear(5, 3)
    zero = ZeroAdamW(model, 1)
    zero.save(folder)
    dist.barrier()
    index = Path(folder, "zero.json")
    assert index.exists()
    (zero_barrier := dist.barrier)()
    try:
        if dist.get_rank() == 0:  # the second save dies at its first barrier
            dist.barrier = lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
            try:
                zero.save(folder)
            except KeyboardInterrupt:
                pass
    finally:
        dist.barrier = zero_barrier
    dist.barrier()
    try:
        zero.load(folder)
    except FileNotFoundError as e:
        return str(e)


def test_a_save_that_was_cut_short_is_not_loaded(ranks, tmp_path):
    assert all(said and "zero.json" in said for said in ranks(half_saved, str(tmp_path / "z")))
