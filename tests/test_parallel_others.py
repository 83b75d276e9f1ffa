"""Context and expert parallelism against one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_train_course.core import IGNORE, PaddedBatches, lm_loss, tiny_llama
from llm_train_course.parallel import (
    CommCounter,
    ExpertParallelMixture,
    MixtureOfExperts,
    RankError,
    Ranks,
    _tiles,
    all_to_all_rows,
    attention_block,
    balance_loss,
    context_slices,
    expert_ranges,
    join_slices,
    merge_blocks,
    ring_attention,
    ring_lm_loss,
    ring_work,
    slice_length,
    take_slice,
    ulysses_attention,
    use_ring_attention,
    within_capacity,
)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, timeout_s=20) as r:
        yield r


# Layouts


@given(st.integers(1, 200), st.integers(1, 9), st.sampled_from(["zigzag", "plain"]))
def test_every_token_is_on_one_rank(length, world, layout):
    if length < world * (2 if layout == "zigzag" else 1):
        with pytest.raises(ValueError, match="too few"):
            context_slices(length, world, layout)
        return
    slices = context_slices(length, world, layout)
    held = [p for runs in slices for start, stop in runs for p in range(start, stop)]
    assert sorted(held) == list(range(length))
    x = torch.randn(2, length, 3)
    assert torch.equal(join_slices([take_slice(x, runs) for runs in slices], slices), x)


@given(st.integers(8, 40), st.integers(1, 4), st.sampled_from(["zigzag", "plain"]))
def test_work_counts_every_visible_pair(length, world, layout):
    slices = context_slices(length, world, layout)
    work = ring_work(slices)
    assert work.sum() == length * (length + 1) // 2
    for hop, rank in itertools.product(range(world), range(world)):  # by enumeration
        positions = [[p for start, stop in slices[r] for p in range(start, stop)] for r in (rank, (rank - hop) % world)]
        assert work[hop, rank] == sum(k <= q for q, k in itertools.product(*positions))


def test_tiles_without_a_visible_pair_are_skipped():
    "In zigzag each rank has exactly two tiles at every later hop, three at its own; none of the two has to be masked."
    slices = context_slices(80, 5)
    for a, b in itertools.product(slices, repeat=2):
        tiles = list(_tiles(a, b, True))
        assert len(tiles) == (3 if a == b else 2)
        assert a == b or all(offset is None for *_, offset in tiles)
        assert len(list(_tiles(a, b, False))) == 4


# Softmax in pieces


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 30.0, 1e4]))
def test_merge_is_exact_for_any_split(seed, size):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, *s, generator=g, dtype=torch.float64) for s in ((2, 3, 4), (9, 4), (9, 4)))
    keys = torch.rand(1, 9, generator=g) < 0.6
    at = sorted(torch.randint(0, 10, (2,), generator=g).tolist())
    parts = [
        attention_block(q, k[:, :, a:b], v[:, :, a:b], size, keys=keys[:, a:b])
        for a, b in ((0, at[0]), (at[0], at[1]), (at[1], 9))
        if a < b
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_blocks(merged, part)
    if keys.any():
        p = (q @ k.unsqueeze(2).mT * size).masked_fill(~keys[:, None, None, None], -torch.inf).softmax(-1)
        assert_close(merged[0], p @ v.unsqueeze(2), rtol=1e-9, atol=1e-11)
    else:
        assert not merged[0].any() and merged[1].isneginf().all()


# Ring attention


def make(T, H, K, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h, T, D, generator=g, dtype=torch.float64).to(dtype) for h in (H, K, K, H)]


def sliced(attend, T, H, K, D, dtype, layout, kw, members=None):
    group = dist.new_group(members) if members else None
    if members and dist.get_rank() not in members:
        return None
    slices = context_slices(T, dist.get_world_size(group), layout)
    q, k, v, d_out = (take_slice(x, slices[dist.get_rank(group)], 2).requires_grad_() for x in make(T, H, K, D, dtype))
    out = attend(q, k, v, slices, group=group, **kw)
    out.backward(d_out.detach())
    return [t.detach() for t in (out, q.grad, k.grad, v.grad)]


def dense(T, H, K, D, dtype, causal=True, key_mask=None, scale=None):
    q, k, v, d_out = (x.requires_grad_() for x in make(T, H, K, D, dtype))
    seen = torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones(T, T, dtype=torch.bool)
    seen = seen.expand(3, 1, T, T) if key_mask is None else seen & key_mask[:, None, None, :]
    s = q @ k.repeat_interleave(H // K, 1).mT * (D**-0.5 if scale is None else scale)
    p = s.masked_fill(~seen, -1e30).softmax(-1) * seen  # a query that sees nothing gets 0
    out = p @ v.repeat_interleave(H // K, 1)
    out.backward(d_out.detach())
    return [t.detach() for t in (out, q.grad, k.grad, v.grad)]


PADDED = torch.ones(3, 29, dtype=torch.bool)
PADDED[0, 20:], PADDED[1, :13], PADDED[2] = False, False, False  # right, left, and a row of padding only


@pytest.mark.parametrize("layout", ["zigzag", "plain"])
@pytest.mark.parametrize(
    "kw",
    [{}, {"causal": False}, {"key_mask": PADDED}, {"causal": False, "key_mask": PADDED, "scale": 0.7}],
    ids=["causal", "full", "padded", "full-padded"],
)
def test_ring_equals_dense(ranks, layout, kw):
    shape = (29, 6, 3, 5, torch.float64)
    results, slices = ranks(sliced, ring_attention, *shape, layout, kw), context_slices(29, 4, layout)
    for got, want in zip(zip(*results), dense(*shape, **kw)):
        assert_close(join_slices(list(got), slices, 2), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("members", [[2], [3, 1], [0, 2, 3]])
def test_ring_in_a_subgroup(ranks, members):
    shape = (13, 2, 1, 3, torch.float64)
    results, slices = ranks(sliced, ring_attention, *shape, "zigzag", {}, members), context_slices(13, len(members))
    assert all(results[r] is None for r in range(4) if r not in members)
    for got, want in zip(zip(*(results[r] for r in sorted(members))), dense(*shape)):  # torch sorts a group's ranks
        assert_close(join_slices(list(got), slices, 2), want, rtol=1e-12, atol=1e-13)


def test_ring_in_bf16_is_as_good_as_its_inputs(ranks):
    "Arithmetic is in fp32 and only results are rounded: within a rounding of the exact answer for the rounded inputs."
    shape = (29, 6, 3, 5)
    results, slices = ranks(sliced, ring_attention, *shape, torch.bfloat16, "zigzag", {}), context_slices(29, 4)
    q, k, v, d_out = (x.double().requires_grad_() for x in make(*shape, torch.bfloat16))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out.backward(d_out.detach())
    for got, want in zip(zip(*results), (out.detach(), q.grad, k.grad, v.grad)):
        got = join_slices(list(got), slices, 2)
        assert got.dtype == torch.bfloat16
        assert float((got.double() - want).norm() / want.norm()) < 2**-8


def test_ulysses_equals_dense(ranks):
    for layout, causal in itertools.product(("zigzag", "plain"), (True, False)):
        shape = (29, 8, 4, 5, torch.float64)
        results, slices = ranks(sliced, ulysses_attention, *shape, layout, {"causal": causal}), context_slices(29, 4, layout)
        for got, want in zip(zip(*results), dense(*shape, causal=causal)):
            assert_close(join_slices(list(got), slices, 2), want, rtol=1e-12, atol=1e-13)


def refusals():
    said = []
    q, k, v, _ = make(5, 4, 2, 3, torch.float32)
    for attend, slices, kw in (
        (ring_attention, context_slices(8, 2), {}),
        (ring_attention, context_slices(24, 4, "plain"), {}),
        (ring_attention, context_slices(20, 4, "plain"), {"key_mask": torch.ones(3, 5, dtype=torch.bool)}),
        (ulysses_attention, context_slices(20, 4, "plain"), {}),
        (lambda q, k, v, s: ring_attention(q[:, :3], k, v, s), context_slices(20, 4, "plain"), {}),
    ):
        try:
            attend(q, k, v, slices, **kw)
        except ValueError as e:
            said.append(str(e))
    return said


def test_refusals_come_before_anything_is_sent(ranks):
    two, length, mask, heads, groups = ranks(refusals)[3]
    assert two == "slices are for 2 ranks, the group has 4"
    assert length == "rank 3 holds 6 tokens by its slices, but q, k, v have 5, 5, 5"
    assert mask == "key_mask must be the whole (3, 20), got (3, 5)"
    assert heads == "4 ranks must divide 4 heads of queries and 2 heads of keys"
    assert groups == "3 heads of queries are no multiple of 2 heads of keys"


def rows():
    g = torch.Generator().manual_seed(1)
    lengths, examples = (19, 11, 5, 19), []
    for n in lengths:
        ids = torch.randint(2, 40, (n,), generator=g).tolist()
        examples.append({"input_ids": ids, "labels": [IGNORE] * (n // 3) + ids[n // 3 :]})
    return examples


def llama_step(side, tied):
    model = tiny_llama(40, hidden_size=16, n_heads=4, n_kv_heads=2, tie_embeddings=tied, seed=2)
    model.model.layers[0].mlp.requires_grad_(False)  # frozen parameters
    use_ring_attention(model)
    batch = PaddedBatches(rows(), 4, 0, side=side, shuffle=False).collate(range(4))
    loss = ring_lm_loss(model, batch) / batch["n_targets"]
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        dist.all_reduce(p.grad)
    torch.optim.AdamW(trained, lr=0.01).step()
    dist.all_reduce(total := loss.detach())
    return total.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, model.state_dict()


@pytest.mark.parametrize("side, tied", [("right", True), ("left", False)])
def test_llama_on_slices_takes_the_same_step(ranks, side, tied):
    model = tiny_llama(40, hidden_size=16, n_heads=4, n_kv_heads=2, tie_embeddings=tied, seed=2)
    model.model.layers[0].mlp.requires_grad_(False)
    batch = PaddedBatches(rows(), 4, 0, side=side, shuffle=False).collate(range(4))
    loss = lm_loss(model, batch) / batch["n_targets"]
    loss.backward()
    results = ranks(llama_step, side, tied)
    for total, grads, state in results:
        assert total == pytest.approx(loss.item(), rel=1e-6)
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert float((grads[name] - p.grad).norm() / p.grad.norm()) < 1e-5, name
        assert all(torch.equal(state[n], results[0][2][n]) for n in state)  # replicas stay equal bit for bit


# Rows from everybody to everybody


@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=4, max_size=4))
def test_rows_arrive_and_gradients_return(ranks, table):
    def exchange(table):
        me = dist.get_rank()
        x = (torch.arange(sum(table[me]), dtype=torch.float64) + 100 * me).view(-1, 1).requires_grad_()
        y = all_to_all_rows(x, table[me], [row[me] for row in table])
        (y * (me + 1)).sum().backward()
        return y.flatten().tolist(), x.grad.flatten().tolist()

    for me, (y, grad) in enumerate(ranks(exchange, table)):
        assert y == [100 * j + sum(table[j][:me]) + i for j in range(4) for i in range(table[j][me])]
        assert grad == [j + 1 for j in range(4) for _ in range(table[me][j])]


def test_a_wrong_number_of_rows_is_refused(ranks):
    with pytest.raises(RankError, match="3 rows, but 4 are to be sent"):
        ranks(lambda: all_to_all_rows(torch.zeros(3, 1), [1] * 4, [1] * 4))


# Experts


def test_ranges():
    assert [len(r) for r in expert_ranges(10, 4)] == [2, 3, 2, 3]
    with pytest.raises(ValueError, match="3 experts are too few for 4 ranks"):
        expert_ranges(3, 4)
    with pytest.raises(ValueError, match="k must be between 1 and 3 experts, got 4"):
        MixtureOfExperts(4, 4, 3, 4)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_capacity_is_a_queue(seed, capacity):
    g = torch.Generator().manual_seed(seed)
    experts = torch.stack([torch.randperm(5, generator=g)[:3] for _ in range(12)])
    valid = torch.rand(12, generator=g) < 0.7
    kept, taken = within_capacity(experts, 5, capacity, valid), [0] * 5
    for choice, token in itertools.product(range(3), range(12)):  # by hand
        e = int(experts[token, choice])
        expected = bool(valid[token]) and taken[e] < capacity
        taken[e] += expected
        assert bool(kept[token, choice]) == expected


@pytest.mark.parametrize("bad", [(1, 0), (0, 1)])
def test_balance_loss_is_least_when_balanced(bad):
    "For probabilities that follow the choices: 1 if balanced, E if not."
    experts = torch.tensor([[0], [1]] * 4)
    assert balance_loss(F.one_hot(experts[:, 0], 2).float(), experts).item() == 1
    assert balance_loss(torch.tensor([bad] * 4).float(), torch.full((4, 1), bad.index(1))).item() == 2


def mixture(n_experts, k, factor, dtype, tie=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        layer = MixtureOfExperts(10, 14, n_experts, k, factor).to(dtype)
    if tie:
        torch.nn.init.zeros_(layer.router.weight)  # ties everywhere: some experts get nothing
    return layer


def spread(n_experts, k, factor, dtype, shares, tie):
    me, layer = dist.get_rank(), ExpertParallelMixture(mixture(n_experts, k, factor, dtype, tie))
    x, d_out = (t.split(shares)[me] for t in inputs(sum(shares), dtype))
    x = x.clone().requires_grad_()
    with CommCounter() as c:
        y, balance, counts = layer(x)
        ((y * d_out).sum() + 0.3 * balance).backward()
    dist.all_reduce(layer.router.weight.grad)
    mine = {
        f"experts.{e}.{n}": p.grad for e, expert in zip(layer.ranges[me], layer.experts) for n, p in expert.named_parameters()
    }
    return y.detach(), x.grad, balance.item(), counts.tolist(), mine | {"router.weight": layer.router.weight.grad}, c.calls


def inputs(n, dtype):
    g = torch.Generator().manual_seed(9)
    return [torch.randn(n, 10, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


@pytest.mark.parametrize(
    "n_experts, k, factor, shares, tie",
    [
        (4, 1, None, (3, 3, 3, 3), False),
        (7, 3, None, (1, 0, 8, 2), False),
        (5, 2, 0.7, (6, 1, 0, 9), False),
        (6, 1, 0.5, (4, 4, 4, 4), True),
    ],
)
def test_experts_on_ranks_equal_one_process(ranks, n_experts, k, factor, shares, tie):
    layer = mixture(n_experts, k, factor, torch.float64, tie)
    x, d_out = inputs(sum(shares), torch.float64)
    x.requires_grad_()
    outs = [layer(part) for part in x.split(shares)]  # capacity is per rank
    y = torch.cat([o[0] for o in outs])
    balance = mixture_balance(layer, x)
    ((y * d_out).sum() + 0.3 * balance).backward()
    results = ranks(spread, n_experts, k, factor, torch.float64, shares, tie)
    assert_close(torch.cat([r[0] for r in results]), y.detach(), rtol=1e-11, atol=1e-13)
    assert_close(torch.cat([r[1] for r in results]), x.grad, rtol=1e-11, atol=1e-13)
    assert sum(r[2] for r in results) == pytest.approx(balance.item(), rel=1e-12)
    assert [n for r in results for n in r[3]] == sum(o[2] for o in outs).tolist()
    seen = {}
    for _, _, _, _, grads, calls in results:
        assert calls["all_to_all"] == 5  # counts, there, back; and both ways again for the gradients
        seen |= grads
    assert set(seen) == {n for n, _ in layer.named_parameters()}
    for name, grad in seen.items():
        assert_close(grad, layer.get_parameter(name).grad, rtol=1e-11, atol=1e-12)


def mixture_balance(layer, x):
    return MixtureOfExperts.forward(layer, x)[1]


def test_bf16_tokens_are_routed_in_fp32(ranks):
    results = ranks(spread, 6, 2, None, torch.bfloat16, (5, 7, 0, 3), False)
    x, _ = inputs(15, torch.bfloat16)
    y, _, counts = mixture(6, 2, None, torch.bfloat16)(x)
    assert [n for r in results for n in r[3]] == counts.tolist()
    got = torch.cat([r[0] for r in results])
    assert got.dtype == torch.bfloat16
    assert_close(got, y, rtol=0.02, atol=0.005)


def test_slices_hold_what_their_runs_say():
    assert [slice_length(runs) for runs in context_slices(10, 2)] == [5, 5]
