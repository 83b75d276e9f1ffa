"Chapter 10: clipping, schedules, RAdam, placements, QK-norm, z-loss, sigmaReparam, the entropy floor, against torch and transformers."
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import on_two_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from llm_train_course.stability import (
    PLACEMENTS,
    Attention,
    PercentileClip,
    RAdam,
    SigmaLinear,
    SmallConfig,
    SmallTransformer,
    ZClip,
    attention_entropy,
    clip_grad_agc,
    clip_grad_norm,
    entropy_floor,
    radam_rectification,
    small_loss,
    soft_cap,
    total_norm,
    warmup_cosine,
    z_loss,
)

torch.set_num_threads(1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def with_grads(grads):
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    return params


SHAPES = [(3, 5), (7,), (1, 2, 4), (1,), ()]


# Clipping


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3, 0.5, math.inf, "inf"])
@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_equals_torch(norm_type, max_norm, dtype):
    grads = [torch.randn(s, generator=gen(k), dtype=dtype) for k, s in enumerate(SHAPES)]
    ours, theirs = with_grads(grads), with_grads(grads)
    frozen = nn.Parameter(torch.ones(3))
    assert_close(clip_grad_norm([*ours, frozen], max_norm, norm_type), torch.nn.utils.clip_grad_norm_([*theirs, frozen], max_norm, norm_type))
    for a, b in zip(ours, theirs):
        assert_close(a.grad, b.grad)
    assert frozen.grad is None


def test_clip_equals_torch_over_training_steps():
    nets = [nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.3) for n in nets]
    for step in range(6):
        x, y = torch.randn(4, 5, generator=gen(step)), 30 * torch.randn(4, 3, generator=gen(step + 50))
        for net, optimizer, clip in zip(nets, optimizers, (clip_grad_norm, torch.nn.utils.clip_grad_norm_)):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            clip(net.parameters(), 0.7)
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert_close(a, b)


def test_clip_single_tensor_generator_and_nothing():
    p = with_grads([torch.tensor([3.0, 4.0])])[0]
    assert float(clip_grad_norm(p, 1.0)) == 5
    assert_close(p.grad, torch.tensor([0.6, 0.8]))
    assert float(clip_grad_norm((q for q in [p]), 1.0)) == pytest.approx(1, abs=1e-5)
    assert float(clip_grad_norm([], 1.0)) == 0
    assert float(clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0)) == 0


def test_a_tied_weight_counts_once():
    p = with_grads([torch.tensor([3.0, 4.0])])[0]
    assert float(clip_grad_norm([p, p], 1.0)) == 5
    assert_close(p.grad, torch.tensor([0.6, 0.8]))  # not scaled twice


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_clip_nonfinite_is_torchs_and_can_raise(bad):
    grads = [torch.tensor([1.0, -2.0]), torch.tensor([[bad, 3.0]])]
    ours, theirs = with_grads(grads), with_grads(grads)
    assert_close(clip_grad_norm(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0), equal_nan=True)
    for a, b in zip(ours, theirs):
        assert_close(a.grad, b.grad, equal_nan=True)
    kept = with_grads(grads)
    with pytest.raises(RuntimeError, match="it cannot be clipped"):
        clip_grad_norm(kept, 1.0, error_if_nonfinite=True)
    assert_close(kept[0].grad, grads[0])  # nothing was touched


def test_clip_refuses_bad_numbers():
    with pytest.raises(ValueError, match="max_norm must not be negative, got -1"):
        clip_grad_norm([], -1)
    with pytest.raises(ValueError, match="got nan"):
        clip_grad_norm([], math.nan)
    with pytest.raises(ValueError, match="norm_type must be positive, got 0"):
        clip_grad_norm([], 1.0, 0)


def test_bf16_norm_is_better_than_torchs():
    grads = [torch.full((1001,), 0.7).bfloat16(), torch.full((3, 333), 1.3).bfloat16()]
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    ours, theirs = with_grads(grads), with_grads(grads)
    a, b = clip_grad_norm(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert abs(float(a) - exact) < 1e-4 * exact < abs(float(b) - exact)
    assert a.dtype == torch.float32 and ours[0].grad.dtype == torch.bfloat16
    for p, q in zip(ours, theirs):
        assert_close(p.grad, q.grad, rtol=2e-2, atol=0)


def test_subnormal_gradients_and_mixed_dtypes():
    grads = [torch.full((4,), 1e-40), torch.tensor([1e-3]).bfloat16(), torch.tensor([1e-3], dtype=torch.float64)]
    assert float(total_norm(grads)) == pytest.approx(math.sqrt(2) * 1e-3, rel=3e-3)


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), min_size=1, max_size=4), st.floats(0.01, 100), st.sampled_from([1.0, 2.0, math.inf]))
@settings(max_examples=60, deadline=None)
def test_clip_properties(rows, max_norm, norm_type):
    params = with_grads([torch.tensor(r) for r in rows])
    before = torch.cat([p.grad for p in params])
    norm = clip_grad_norm(params, max_norm, norm_type)
    after = torch.cat([p.grad for p in params])
    assert_close(norm, torch.linalg.vector_norm(before, norm_type), rtol=1e-4, atol=1e-5)
    assert float(torch.linalg.vector_norm(after, norm_type)) <= max_norm * (1 + 1e-4)
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    assert_close(after, before * factor, rtol=1e-4, atol=1e-5)  # one factor: the direction stays
    again = after.clone()
    clip_grad_norm(params, max_norm, norm_type)
    assert_close(torch.cat([p.grad for p in params]), again, rtol=1e-4, atol=1e-5)  # idempotent


def test_per_parameter_equals_torch_on_each():
    grads = [torch.randn(s, generator=gen(k)) for k, s in enumerate(SHAPES)]
    ours, theirs = with_grads(grads), with_grads(grads)
    joint = clip_grad_norm(ours, 0.5, per_parameter=True)
    assert_close(joint, total_norm(grads))
    for a, b in zip(ours, theirs):
        torch.nn.utils.clip_grad_norm_(b, 0.5)
        assert_close(a.grad, b.grad)


def test_replicated_may_be_a_generator():
    grads = [torch.randn(s, generator=gen(k)) for k, s in enumerate(SHAPES)]
    as_list, as_generator = with_grads(grads), with_grads(grads)
    a = clip_grad_norm(as_list[2:], 0.5, replicated=as_list[:2])
    b = clip_grad_norm((p for p in as_generator[2:]), 0.5, replicated=(p for p in as_generator[:2]))
    assert_close(a, total_norm(grads))
    assert_close(b, a)
    for p, q in zip(as_list, as_generator):
        assert_close(q.grad, p.grad)
        assert float(q.grad.norm()) < 0.5  # all of them were clipped


def _sharded(rank, folder):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for norm_type, max_norm, per in itertools.product((2.0, 1.0, math.inf), (0.5, 1e6), (False, True)):
        full = [torch.randn(5, 3, generator=gen(1)), torch.randn(1, 4, generator=gen(2))]  # the second leaves rank 1 empty
        shared = torch.randn(6, generator=gen(3))
        cut = [full[0][:3], full[0][3:]], [full[1], full[1][1:]]
        mine, whole = with_grads([c[rank] for c in cut]), with_grads([shared])
        norm = clip_grad_norm([*mine, *whole], max_norm, norm_type, replicated=whole, group=dist.group.WORLD, per_parameter=per)
        reference = with_grads([*full, shared])
        expected = clip_grad_norm(reference, max_norm, norm_type, per_parameter=per)  # one process
        assert_close(norm, expected)
        for own, r, at in zip(mine, reference, (3, 1)):
            assert_close(own.grad, r.grad[:at] if rank == 0 else r.grad[at:])
        assert_close(whole[0].grad, reference[2].grad)
        if not per:  # torch's own clipping of DTensors, which FSDP2 uses
            params = [nn.Parameter(distribute_tensor(torch.zeros_like(f), mesh, [Shard(0)])) for f in full]
            for p, f in zip(params, full):
                p.grad = distribute_tensor(f.clone(), mesh, [Shard(0)])
            theirs = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, foreach=False) if norm_type != math.inf else None
            if theirs is not None:
                ours = with_grads([c[rank] for c in cut])
                assert_close(clip_grad_norm(ours, max_norm, norm_type, group=dist.group.WORLD), theirs.full_tensor())
                for a, b in zip(ours, params):
                    assert_close(a.grad, b.grad.to_local())
    # a rank whose shards are all empty, or have no gradient, sends what the others send
    long = torch.randn(1, 4, generator=gen(4), dtype=torch.float64)
    for without in (False, True):
        (own,) = with_grads([long[rank:]])
        if rank and without:
            own.grad = None
        norm = clip_grad_norm([own], 0.5, group=dist.group.WORLD)
        assert norm.dtype == torch.float64
        assert_close(norm, torch.linalg.vector_norm(long))
        if rank == 0:
            assert_close(own.grad, long * (0.5 / (norm + 1e-6)))
    # a NaN on one rank is seen by both
    bad = with_grads([torch.tensor([math.nan if rank else 1.0])])
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm(bad, 1.0, error_if_nonfinite=True, group=dist.group.WORLD)
    # without the group each rank scales by its own norm, and the shards no longer belong together
    alone = with_grads([cut[0][rank]])
    assert abs(float(clip_grad_norm(alone, 0.5)) - float(total_norm(full[:1]))) > 0.1


def test_clip_sharded_over_two_ranks(tmp_path):
    on_two_ranks(_sharded, tmp_path)


# Adaptive clipping


@given(st.lists(st.floats(1e-6, 1e6), min_size=10, max_size=40), st.floats(0.1, 100))
@settings(max_examples=60, deadline=None)
def test_percentile_is_numpys(values, percentile):
    rule = PercentileClip(percentile)
    limits = [rule.update(v) for v in values]
    assert limits[:9] == [math.inf] * 9
    assert limits[-1] == pytest.approx(float(np.percentile(values, percentile)), rel=1e-9)


def test_percentile_window_forgets_and_skips_nonfinite():
    rule = PercentileClip(50, window=10)
    for v in [1e6] * 10 + [1.0] * 10:
        limit = rule.update(v)
    assert limit == 1.0
    for bad in (math.nan, math.inf):
        assert rule.update(bad) == 1.0
    with pytest.raises(ValueError, match="percentile must be in"):
        PercentileClip(101)
    with pytest.raises(ValueError, match="window=5"):
        PercentileClip(90, window=5)


def zclip_by_hand(norms, alpha, z0, warmup, eps):
    "The rule written as one loop over plain numbers, from the paper: Eq. for z, the reciprocal clip, moments of what passed."
    limits, start, mean, var = [], [], None, None
    for x in norms:
        if mean is None:
            limits.append(math.inf)
            start.append(x)
            if len(start) == warmup:
                mean, var = float(np.mean(start)), float(np.var(start))
            continue
        z = (x - mean) / (var**0.5 + eps)
        limits.append(mean + z0 * var**0.5 / (z / z0) if z > z0 else math.inf)
        passed = min(x, limits[-1])
        mean = alpha * mean + (1 - alpha) * passed
        var = alpha * var + (1 - alpha) * (passed - mean) ** 2
    return limits


def test_zclip_over_a_heavy_tailed_run():
    norms = np.random.default_rng(0).lognormal(0, 1.2, 300).tolist()
    rule = ZClip()
    ours, theirs = [rule.update(x) for x in norms], zclip_by_hand(norms, 0.97, 2.5, 25, 1e-6)
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert 5 < sum(x < math.inf for x in ours) < 60


def test_zclip_larger_outliers_keep_less_and_do_not_raise_the_bar():
    def limit_for(x):
        rule = ZClip(warmup_steps=20)
        for k in range(20):
            rule.update(1.0 + 0.1 * (k % 2))
        return rule.update(x), rule.mean
    limits = [limit_for(x)[0] for x in (1.5, 3.0, 30.0, 1e6, math.inf)]
    assert limits == sorted(limits, reverse=True) and limits[-1] == pytest.approx(1.05)
    assert limit_for(1e6)[1] == pytest.approx(1.05, abs=1e-3)
    rule = ZClip(warmup_steps=2)
    assert rule.update(math.nan) == math.inf and rule.first == []
    with pytest.raises(ValueError, match="z_threshold > 0"):
        ZClip(z_threshold=0)


def test_agc_bounds_every_unit_and_only_those_over():
    p = nn.Parameter(torch.randn(6, 3, 2, generator=gen()))
    p.grad = torch.randn(6, 3, 2, generator=gen(1)) * torch.tensor([1e-4, 1, 10, 1e-4, 1, 10]).view(6, 1, 1)
    before = p.grad.clone()
    n = clip_grad_agc([p], 0.05)
    ratio = p.grad.flatten(1).norm(dim=1) / p.detach().flatten(1).norm(dim=1)
    assert n == 4 and (ratio <= 0.05 * (1 + 1e-5)).all()
    assert_close(p.grad[[0, 3]], before[[0, 3]])
    assert_close(F.cosine_similarity(p.grad.flatten(1), before.flatten(1)), torch.ones(6))


def test_agc_vectors_zero_weights_bf16():
    bias, gain = (nn.Parameter(torch.zeros(3)), nn.Parameter(torch.full((4,), 2.0)))
    bias.grad, gain.grad = torch.ones(3), torch.ones(4)
    assert clip_grad_agc([bias, gain], 0.1) == 2  # as whole vectors
    assert float(bias.grad.norm()) == pytest.approx(1e-4, rel=1e-4) and float(gain.grad.norm()) == pytest.approx(0.4, rel=1e-4)
    half = nn.Parameter(torch.ones(2, 3).bfloat16())
    half.grad = torch.full((2, 3), 9.0).bfloat16()
    clip_grad_agc([half], 0.5)
    assert half.grad.dtype == torch.bfloat16
    assert_close(half.grad.float().norm(dim=1), torch.full((2,), 0.5 * 3**0.5), rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="clipping must be positive, got 0"):
        clip_grad_agc([], 0)


# Schedules and RAdam


@given(st.integers(0, 40), st.integers(1, 60), st.floats(0, 0.9), st.sampled_from([0.5, 1.0, 1.5, 2.5]))
@settings(max_examples=40, deadline=None)
def test_warmup_cosine_is_transformers(warmup, rest, ratio, cycles):
    from transformers import get_cosine_with_min_lr_schedule_with_warmup
    total = warmup + rest
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, cycles, min_lr=ratio)
    for step in range(total + 2):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(warmup_cosine(step, warmup, total, ratio, cycles), abs=1e-12)
        optimizer.step()
        schedule.step()


def test_warmup_cosine_ends_and_refuses():
    assert warmup_cosine(0, 0, 10) == 1 and warmup_cosine(10, 0, 10) == 0 and warmup_cosine(10, 3, 10, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(0, 5, 5) == 0 and warmup_cosine(5, 5, 5) == 1
    with pytest.raises(ValueError, match="got 11 and 10"):
        warmup_cosine(0, 11, 10)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9), (0.0, 0.5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_radam_is_torchs(betas, weight_decay):
    start = [torch.randn(3, 5, generator=gen()), torch.randn(4, generator=gen(1))]
    ours, theirs = ([nn.Parameter(s.clone()) for s in start] for _ in range(2))
    optimizers = RAdam(ours, 0.05, betas, weight_decay=weight_decay), torch.optim.RAdam(theirs, 0.05, betas, weight_decay=weight_decay, decoupled_weight_decay=True)
    for step in range(40):
        for params, optimizer in zip((ours, theirs), optimizers):
            for k, p in enumerate(params):  # the second parameter gets no gradient at every third step
                p.grad = None if k and step % 3 == 0 else torch.cos(p.detach() * (1 + step)) * 10.0 ** (step % 5 - 2)
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_radam_resumes_and_refuses():
    p = nn.Parameter(torch.ones(2))
    a = RAdam([p], 0.1)
    for _ in range(7):
        p.grad = p.detach().clone()
        a.step()
    q = nn.Parameter(p.detach().clone())
    b = RAdam([q], 0.1)
    b.load_state_dict(copy.deepcopy(a.state_dict()))  # torch's own loading shares tensors
    for r, optimizer in ((p, a), (q, b)):
        r.grad = torch.ones(2)
        optimizer.step()
    assert_close(p, q)
    with pytest.raises(ValueError, match="betas in"):
        RAdam([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="step >= 1"):
        radam_rectification(0)


def test_rectification_rises_to_one():
    for beta2 in (0.95, 0.999):
        values = [radam_rectification(t, beta2) for t in range(1, 30_000, 7)]
        seen = [v for v in values if v is not None]
        assert values[0] is None and seen == sorted(seen) and 0 < seen[0] < 0.35 and seen[-1] == pytest.approx(1, abs=1e-4)
    assert all(radam_rectification(t, 0.6) is None for t in (1, 10, 1000))  # an average of four squares never suffices


# The small transformer


def by_formula(placement, x, f, N, alpha):
    return {"none": lambda: x + 0.5 * f(x), "post": lambda: N(x + 0.5 * f(x)), "pre": lambda: x + 0.5 * f(N(x)), "sandwich": lambda: x + 0.5 * N(f(N(x))),
            "output": lambda: x + 0.5 * N(f(x)), "deepnorm": lambda: N(alpha * x + 0.5 * f(x))}[placement]()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_placements_by_their_formulas(placement, norm):
    x = torch.randn(2, 5, 12, generator=gen())
    model = SmallTransformer(SmallConfig(7, 12, 3, 2, placement=placement, norm=norm, branch_scale=0.5), seed=3)
    layer = model.layers[1]
    N = (lambda t: F.layer_norm(t, (12,))) if norm == "layer" else (lambda t: F.rms_norm(t, (12,), eps=1e-6))
    assert_close(layer(x), by_formula(placement, x, layer.sublayer, N, 6**0.25))
    assert model.config.deepnorm == ((6**0.25, 24**-0.25) if placement == "deepnorm" else (1.0, 1.0))
    assert isinstance(model.last_norm, nn.Identity) == (placement in ("none", "post", "deepnorm"))


def test_attention_is_torchs():
    c = SmallConfig(7, 12, 1, 3)
    torch.manual_seed(0)
    attention, x = Attention(c), torch.randn(2, 6, 12)
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (attention.q, attention.k, attention.v))
    expected = attention.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
    assert_close(attention(x), expected)


def test_qk_norm_is_scale_free_and_bounded():
    c = SmallConfig(7, 12, 1, 3, qk_norm=True)
    torch.manual_seed(0)
    attention, x = Attention(c), torch.randn(2, 6, 12)
    attention.watch = True
    before = attention(x)
    with torch.no_grad():
        attention.q.weight *= 1e4
    assert_close(attention(x), before, rtol=1e-3, atol=1e-4)
    assert attention.max_logit <= 4**0.5 * (1 + 1e-5)
    with torch.no_grad():
        attention.q_norm.weight *= 3
        attention(x)
    assert 2 < attention.max_logit <= 3 * 4**0.5 * (1 + 1e-5)


def test_watching_changes_nothing():
    c = SmallConfig(7, 12, 2, 3)
    ids, grads = torch.randint(0, 7, (2, 8), generator=gen()), []
    for watch in (False, True):
        model = SmallTransformer(c, seed=1)
        for m in model.modules():
            if isinstance(m, Attention):
                m.watch = watch
        small_loss(model, ids).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_initialisation_is_what_the_config_says():
    base, small, deep = (SmallTransformer(SmallConfig(50, 64, 8, **kw), seed=5) for kw in ({}, {"small_init": True, "embed_std": 0.02}, {"placement": "deepnorm"}))
    for part, factor_small, factor_deep in (("q", 1, 1), ("v", 1, 64**-0.25), ("o", 0.25, 64**-0.25)):
        weights = [getattr(m.layers[2].sublayer, part).weight for m in (base, small, deep)]
        assert float(weights[0].detach().std()) == pytest.approx(1 / 8, rel=0.05)
        assert_close(weights[1], weights[0] * factor_small)
        assert_close(weights[2], weights[0] * factor_deep)
    assert float(base.embed(torch.arange(48)[None]).detach().std()) == pytest.approx(1, rel=0.05)
    assert float(small.tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("reparam", [False, True])
def test_a_model_is_determined_by_its_seed_and_draws_nothing_else(reparam):
    state = torch.get_rng_state()
    a = SmallTransformer(SmallConfig(50, 16, 1, sigma_reparam=reparam), seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(123)
    b = SmallTransformer(SmallConfig(50, 16, 1, sigma_reparam=reparam), seed=5)
    c = SmallTransformer(SmallConfig(50, 16, 1, sigma_reparam=reparam), seed=6)
    assert a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.head.weight, c.head.weight)
    if reparam:  # the starts of the power iterations, too, are unit vectors of the seed
        assert not torch.equal(a.layers[0].sublayer.q.u, c.layers[0].sublayer.q.u) and float(a.layers[0].sublayer.q.u.norm()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("bad, message", [({"placement": "peri"}, "got 'peri'"), ({"norm": "batch"}, "got 'batch'"), ({"hidden_size": 10, "n_heads": 4}, "got 10 and 4")])
def test_config_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        SmallConfig(7, **bad)


def test_all_switches_train_together():
    c = SmallConfig(9, 12, 2, 3, placement="sandwich", norm="rms", qk_norm=True, attention_cap=30.0, logit_cap=20.0, sigma_reparam=True, embed_norm=True, intermediate_size=17)
    model = SmallTransformer(c)
    ids = torch.randint(0, 9, (3, 11), generator=gen())
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = small_loss(model, ids, 1e-4)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0] and float(model(ids).detach().abs().max()) <= 20


# Logits


@given(st.integers(2, 8), st.floats(0, 20), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_no_softmax_is_below_the_floor(n, bound, seed):
    z = bound * (2 * torch.rand(n, generator=gen(seed), dtype=torch.float64) - 1)
    z = torch.where(torch.rand(n, generator=gen(seed + 1)) < 0.5, z.sign() * bound, z)  # many at the ends
    assert float(attention_entropy(z.softmax(-1)[None])) >= entropy_floor(n, bound) - 1e-5


def test_entropy_floor_ends_and_refuses():
    assert entropy_floor(9, 0.0) == pytest.approx(math.log(9)) and entropy_floor(1, 3.0) == 0
    assert entropy_floor(3, 800.0) == pytest.approx(0, abs=1e-12)  # exp(-1600) underflows
    assert entropy_floor(64, 0.1) == pytest.approx(math.log(64) - 0.1**2 / 2, abs=1e-4)  # small M: ln T - Var/2, half of them up
    with pytest.raises(ValueError, match="got 0 and 1"):
        entropy_floor(0, 1)


def test_entropy_is_torchs_and_padding_is_left_out():
    p = torch.randn(2, 3, 5, 5, generator=gen()).softmax(-1)
    assert_close(attention_entropy(p), torch.distributions.Categorical(p).entropy())
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    for pad in (2, 0, 5):  # left padding, none, a row of padding only
        seen = visible & (torch.arange(5) >= pad)
        probs = torch.zeros(5, 5).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
        assert_close(attention_entropy(probs, True, seen), seen.any(-1).float())  # a query that sees nothing counts as 0
    assert attention_entropy(p.bfloat16()).dtype == torch.float32


def test_z_loss_gradient_and_cap():
    z = torch.randn(4, 3, 7, generator=gen(), dtype=torch.float64).requires_grad_()
    keep = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    z_loss(z, keep).backward()
    level = z.detach().logsumexp(-1, keepdim=True)
    assert_close(z.grad, 2 * level * z.detach().softmax(-1) * keep.unsqueeze(-1) / 6, rtol=1e-5, atol=1e-6)
    spoiled = z.detach().clone()
    spoiled[~keep] = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)  # padding may hold anything
    spoiled.requires_grad_()
    z_loss(spoiled, keep).backward()
    assert_close(spoiled.grad, z.grad)
    wide = torch.full((2, 5), 3e4).half()
    assert z_loss(wide).isfinite()  # in float32: the square is 9e8
    x = torch.linspace(-1e4, 1e4, 101, dtype=torch.float64)
    assert soft_cap(x, 30.0).abs().max() <= 30 and soft_cap(x, None) is x and (soft_cap(x, 30.0).diff() >= 0).all()


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (1, 5)])
def test_sigma_linear_is_spectral_norm_times_gamma(shape):
    torch.manual_seed(0)
    layer = SigmaLinear(*shape)
    x = torch.randn(3, shape[0])
    for _ in range(300):
        layer(x)
    layer.eval()
    u = layer.u.clone()
    with torch.no_grad():
        layer.gamma.fill_(1.7)
        assert float(torch.linalg.matrix_norm(layer.matrix(), 2)) == pytest.approx(1.7, rel=1e-4)
        layer.weight *= 5
        assert float(torch.linalg.matrix_norm(layer.matrix(), 2)) == pytest.approx(1.7, rel=1e-4)  # scale free
    assert torch.equal(u, layer.u)  # evaluation does not move the power iteration
    twin = SigmaLinear(*shape)
    twin.load_state_dict(layer.state_dict())
    assert_close(twin.eval()(x), layer(x))
    layer.train()
    layer(x).square().sum().backward()
    # the gradient has no part along the weight: rescaling it changes nothing
    assert abs(float((layer.weight.grad * layer.weight).sum())) < 1e-3 * float(layer.weight.grad.norm() * layer.weight.norm()) + 1e-5


def test_cuda_clip_and_model_agree_with_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ids = torch.randint(0, 7, (2, 8), generator=gen())
    norms = []
    for device in ("cpu", "cuda"):
        model = SmallTransformer(SmallConfig(7, 12, 2, 3)).to(device)
        small_loss(model, ids.to(device)).backward()
        norms.append(float(clip_grad_norm(model.parameters(), 0.1)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
