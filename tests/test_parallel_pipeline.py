"Pipeline schedules: against brute force and hand-written orders, and executed on processes against one process and torch."
import itertools
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llm_train_course.core import IGNORE, PaddedBatches, tiny_llama
from llm_train_course.parallel import (
    PipelineSchedule,
    Ranks,
    Timeline,
    _outputs_of,
    backward_input,
    backward_weight,
    blocked,
    bubble_fraction,
    check_schedule,
    clip_pipeline_grads,
    llama_stages,
    pipeline_loss,
    pipeline_program,
    pipeline_schedule,
    run_pipeline,
    simulate,
    sum_tied_gradients,
)

KINDS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as ranks:
        yield ranks


def make(n_layers=8, **kw):
    return tiny_llama(53, hidden_size=16, n_heads=4, n_kv_heads=2, n_layers=n_layers, intermediate_size=24, max_length=32, **kw)


def micro_batches(m=4, side="right", seed=0, empty=True):
    "Unequal lengths and numbers of targets; one row of padding only."
    g, rows = torch.Generator().manual_seed(seed), []
    for k in range(2 * m):
        ids = torch.randint(2, 53, (int(torch.randint(2, 12, (), generator=g)),), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE if (i + k) % 3 == 0 else token for i, token in enumerate(ids)]})
    if empty:
        rows[3] = {"input_ids": [0], "labels": [IGNORE]}
    layout = PaddedBatches(rows, 2, 0, side=side, shuffle=False)
    found = [layout.collate([2 * k, 2 * k + 1]) for k in range(m)]
    if empty:
        found[1]["attention_mask"][1] = 0
    return found


def loss_of(batches):
    return pipeline_loss(sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in batches))


def whole(model, batches, times=1):
    "Losses and gradients of one process, micro-batch after micro-batch."
    loss, losses = loss_of(batches), []
    for batch in batches * times:
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
        losses.append(loss(model(**inputs, use_cache=False).logits, batch))
        losses[-1].backward()
    return torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def piped(schedule, model_of, batches, times=1, group_of=None, loss=None):
    "The same on a rank of a pipeline: losses, gradients by name."
    group = group_of() if group_of else None
    rank, p = dist.get_rank(group), dist.get_world_size(group)
    chunks = llama_stages(model_of(), p * schedule.chunks)[rank::p]
    for _ in range(times):
        losses = run_pipeline(schedule, chunks, batches, loss or loss_of(batches), group)
    return losses, {n: w.grad for c in chunks for n, w in c.named_parameters() if w.requires_grad}


def check_grads(parts, grads, exact=False):
    seen = set()
    for _, part in parts:
        for name, grad in part.items():
            name = name if name in grads else "model.embed_tokens.weight"
            assert grad is not None and grads[name] is not None, name
            if exact:
                assert torch.equal(grad, grads[name]), name
            else:
                torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            seen.add(name)
    assert seen == set(grads)


# the data


def longest_path(s, f, b, w):
    "Length of a schedule by relaxing all constraints until nothing changes: no event order, no clock."
    S = s.stages * s.chunks
    cost = {"F": f / s.chunks, "B": ((b - w) if s.splits_backward else b) / s.chunks, "W": w / s.chunks}
    before = {}
    for rank, ops in enumerate(s.ops):
        for k, (kind, c, m) in enumerate(ops):
            stage = c * s.stages + rank
            after = [(rank, ops[k - 1])] if k else []
            after += [((stage - 1) % s.stages, ("F", (stage - 1) // s.stages, m))] if kind == "F" and stage else []
            after += [((stage + 1) % s.stages, ("B", (stage + 1) // s.stages, m))] if kind == "B" and stage < S - 1 else []
            after += [(rank, ("F", c, m))] if kind == "B" else [(rank, ("B", c, m))] if kind == "W" else []
            before[rank, (kind, c, m)] = after
    end, changed = dict.fromkeys(before, 0.0), True
    while changed:
        changed = False
        for key, after in before.items():
            value = max([0.0] + [end[a] for a in after]) + cost[key[1][0]]
            if value > end[key] + 1e-12:
                end[key], changed = value, True
    return max(end.values())


@pytest.mark.parametrize("kind, v", KINDS + [("interleaved", 3), ("interleaved", 1)])
def test_simulation_is_the_longest_path(kind, v):
    for p, m in ((1, 1), (1, 3), (2, 4), (3, 3), (4, 8), (5, 10)):
        s = pipeline_schedule(kind, p, m, v)
        for f, b, w in ((1, 2, 1), (0.7, 2.5, 0.4), (2, 1, 1), (0, 1, 0.5)):
            assert simulate(s, f, b, w).length == pytest.approx(longest_path(s, f, b, w))


def test_numbers_of_the_article():
    assert round(bubble_fraction(8, 32), 3) == 0.179 and round(bubble_fraction(8, 32, 2), 3) == 0.099
    assert bubble_fraction(1, 5) == 0 and bubble_fraction(4, 1) == 0.75
    for bad in ((0, 1), (1, 0), (2, 2, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            bubble_fraction(*bad)


def test_interleaving_with_one_chunk_doubles_the_warm_up_not_the_bubble():
    one, plain = simulate(pipeline_schedule("interleaved", 4, 8)), simulate(pipeline_schedule("1f1b", 4, 8))
    assert one.length == plain.length and one.peak == (7, 5, 3, 1) and plain.peak == (4, 3, 2, 1)


@pytest.mark.parametrize("p, m", [(2, 2), (3, 7), (4, 8), (5, 5), (4, 2)])
def test_zero_bubble_holds_no_more_than_1f1b_and_waits_a_third_as_long(p, m):
    new, old = simulate(pipeline_schedule("zero-bubble", p, m)), simulate(pipeline_schedule("1f1b", p, m))
    assert new.peak == (max(old.peak),) * p
    if m >= p:
        assert new.length - 3 * m == pytest.approx((old.length - 3 * m) / 3)
    assert new.length <= old.length


def test_zero_bubble_by_hand():
    assert pipeline_schedule("zero-bubble", 2, 2).ops == (
        (("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("W", 0, 0), ("B", 0, 1), ("W", 0, 1)),
        (("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1), ("W", 0, 0), ("W", 0, 1)))


def test_idle_share_is_that_of_the_spans():
    t = Timeline((((("F", 0, 0), 5.0, 6.0), (("B", 0, 0), 8.0, 9.0)), ((("F", 0, 0), 6.0, 7.0), (("B", 0, 0), 7.0, 8.0))))
    assert t.length == 4 and t.idle == 0.5 and t.peak == (1, 1)


@pytest.mark.parametrize("args, message", [
    (("pipedream", 2, 2), "kind must be one of gpipe, 1f1b, interleaved, zero-bubble, got 'pipedream'"),
    (("1f1b", 2, 2.0), "microbatches must be a positive integer, got 2.0"),
    (("1f1b", True, 2), "stages must be a positive integer, got True"),
    (("interleaved", 4, 6, 2), "6 is no multiple of 4"),
    (("zero-bubble", 4, 6, 2), "one chunk a rank, got chunks=2")])
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        pipeline_schedule(*args)


def random_schedule(seed, p, m, v, split):
    "Any order that can run: at random, some rank does some operation that is ready."
    rng, done, ops = random.Random(seed), set(), [[] for _ in range(p)]
    S = p * v
    todo = {(k, stage, i) for k in ("FBW" if split else "FB") for stage in range(S) for i in range(m)}
    def ready(op):
        k, stage, i = op
        needs = {"F": [("F", stage - 1, i)] if stage else [], "W": [("B", stage, i)],
                 "B": [("F", stage, i)] + ([("B", stage + 1, i)] if stage < S - 1 else [])}[k]
        return all(n in done for n in needs)
    while todo:
        k, stage, i = op = rng.choice(sorted(o for o in todo if ready(o)))
        todo.remove(op), done.add(op)
        ops[stage % p].append((k, stage // p, i))
    return PipelineSchedule("random", p, m, v, tuple(map(tuple, ops)))


def test_any_schedule_that_runs_has_a_program_that_no_blocking_send_hangs():
    for seed in range(40):
        rng = random.Random(seed)
        s = check_schedule(random_schedule(seed, rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 3), rng.random() < 0.5))
        programs = pipeline_program(s)
        assert blocked(programs) == []
        for rank, program in enumerate(programs):
            assert tuple(op for op in program if op[0] in "FBW") == s.ops[rank]
            for op in program:   # what is received was sent to this rank, once
                if op[0] == "recv":
                    assert programs[op[1]].count(("send", rank, op[2])) == 1


def test_a_swapped_receive_is_found():
    programs = pipeline_program(pipeline_schedule("1f1b", 2, 2))
    k = [n for n, op in enumerate(programs[1]) if op[0] == "recv"]
    programs[1][k[0]], programs[1][k[1]] = programs[1][k[1]], programs[1][k[0]]
    assert [rank for rank, _ in blocked(programs)] == [0, 1]


def test_broken_schedules_are_refused():
    s = pipeline_schedule("zero-bubble", 3, 4)
    swap = lambda ops, a, b: tuple(ops[b] if o == ops[a] else ops[a] if o == ops[b] else o for o in ops)
    early = [n for n, op in enumerate(s.ops[1]) if op[1:] == (0, 1) and op[0] != "F"]   # W before its B
    with pytest.raises(ValueError, match=r"waits for itself: .*rank 1 before \('W', 0, 1\)"):
        check_schedule(replace(s, ops=(s.ops[0], swap(s.ops[1], *early), s.ops[2])))
    with pytest.raises(ValueError, match=r"rank 2: \('W', 0, 3\) occurs 0 times"):
        check_schedule(replace(s, ops=(*s.ops[:2], s.ops[2][:-1])))
    with pytest.raises(ValueError, match="operations for 2 ranks and 3 stages"):
        check_schedule(replace(s, ops=s.ops[:2]))
    with pytest.raises(ValueError, match="weight not above backward"):
        simulate(s, backward=1.0, weight=1.5)


# half a backward pass


class Shared(nn.Module):
    "A layer that is used twice, one that is used once, one that is not used, and one whose output is changed in place."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.once, self.never, self.frozen = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 5), nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        y = self.once(self.twice(torch.tanh(self.twice(x))) + self.frozen(x))
        y *= 2
        return y * self.scale


def test_halves_of_a_backward_pass_equal_the_whole():
    x, dy = torch.randn(4, 5), torch.randn(4, 3)
    net, other = Shared(), Shared()
    a, b, calls = x.clone().requires_grad_(), x.clone().requires_grad_(), []
    net(a).backward(dy)
    for _ in range(2):   # gradients add up
        calls.clear()
        with _outputs_of(other, calls):
            y = other(b)
        found = backward_input(other, b, y, dy, calls)
        assert other.once.weight.grad is None or torch.equal(other.once.weight.grad, net.once.weight.grad)   # not touched by the first half
        backward_weight(found)
    torch.testing.assert_close(b.grad, 2 * a.grad)
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        assert (p.grad is None) == (q.grad is None) == (name.startswith(("never", "frozen"))), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, 2 * p.grad, msg=lambda m, n=name: f"{n}: {m}")
    assert not any(m._forward_hooks for m in other.modules())


# executed


@pytest.mark.parametrize("kind, v", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_untied_gradients_are_those_of_one_process_bit_for_bit(ranks, kind, v, side):
    batches, model = micro_batches(side=side), partial(make, tie_embeddings=False)
    losses, grads = whole(model(), batches)
    assert torch.isfinite(losses).all()
    parts = ranks(piped, pipeline_schedule(kind, 4, 4, v), model, batches)
    assert all(torch.equal(part[0], losses) for part in parts)
    check_grads(parts, grads, exact=True)


def test_tied_gradients_accumulate_over_two_calls(ranks):
    batches = micro_batches()
    losses, grads = whole(make(), batches, times=2)
    parts = ranks(piped, pipeline_schedule("zero-bubble", 4, 4), make, batches, 2)
    check_grads(parts, grads)
    assert torch.equal(parts[0][1]["model.embed_tokens.weight"], parts[3][1]["lm_head.weight"])


def test_a_mean_for_each_micro_batch_is_another_gradient(ranks):
    batches = micro_batches()
    _, grads = whole(make(), batches)
    mean = lambda logits, batch: loss_of([batch])(logits, batch) / 4
    parts = ranks(piped, pipeline_schedule("1f1b", 4, 4), make, batches, 1, None, mean)
    with pytest.raises(AssertionError):
        check_grads(parts, grads)


def frozen_front():
    "The embedding and the first three layers frozen: the first stage has nothing to train."
    model = make(tie_embeddings=False)
    for part in (model.model.embed_tokens, *model.model.layers[:3]):
        part.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind, v", [("1f1b", 1), ("zero-bubble", 1)])
def test_frozen_stages(ranks, kind, v):
    batches = micro_batches()
    _, grads = whole(frozen_front(), batches)
    parts = ranks(piped, pipeline_schedule(kind, 4, 4, v), frozen_front, batches)
    assert parts[0][1] == {}
    check_grads(parts, grads, exact=True)


def in_bf16():
    return make(tie_embeddings=False).bfloat16()


@pytest.mark.parametrize("kind, v", [("interleaved", 2), ("zero-bubble", 1)])
def test_bf16_travels_as_bf16(ranks, kind, v):
    batches = micro_batches()
    losses, grads = whole(in_bf16(), batches)
    parts = ranks(piped, pipeline_schedule(kind, 4, 4, v), in_bf16, batches)
    assert torch.equal(parts[1][0], losses.float())
    check_grads(parts, grads, exact=True)


def pair_of_ranks():
    "Two pipelines of two ranks; the second one's ranks are 2 and 3."
    groups = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    return groups[dist.get_rank() // 2]


def alone():
    return [dist.new_group([r]) for r in range(4)][dist.get_rank()]


@pytest.mark.parametrize("kind, v", KINDS)
def test_two_pipelines_side_by_side(ranks, kind, v):
    batches, model = micro_batches(6), partial(make, 5)
    losses, grads = whole(model(), batches)
    parts = ranks(piped, pipeline_schedule(kind, 2, 6, v), model, batches, 1, pair_of_ranks)
    for pair in (parts[:2], parts[2:]):
        torch.testing.assert_close(pair[0][0], losses)
        check_grads(pair, grads)


@pytest.mark.parametrize("kind, v", KINDS + [("interleaved", 3)])
def test_a_pipeline_of_one_rank(ranks, kind, v):
    batches, model = micro_batches(3), partial(make, 3)
    _, grads = whole(model(), batches)
    parts = ranks(piped, pipeline_schedule(kind, 1, 3, v), model, batches, 1, alone)
    check_grads(parts[2:3], grads)


@pytest.mark.parametrize("split", [False, True])
def test_any_order_that_can_run_gives_the_same_gradients(ranks, split):
    batches = micro_batches(3)
    _, grads = whole(make(), batches)
    for seed in range(3):
        check_grads(ranks(piped, check_schedule(random_schedule(seed, 4, 3, 2, split)), make, batches), grads)


def clipped(max_norm):
    rank, batches = dist.get_rank(), micro_batches()
    chunks = llama_stages(make(), 4)[rank::4]
    run_pipeline(pipeline_schedule("1f1b", 4, 4), chunks, batches, loss_of(batches))
    norm = clip_pipeline_grads(chunks, max_norm)
    return norm, {n: w.grad for c in chunks for n, w in c.named_parameters()}


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_clipping_is_that_of_the_whole_model(ranks, max_norm):
    model = make()
    _, grads = whole(model, micro_batches())
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    parts = ranks(clipped, max_norm)
    for part in parts:
        torch.testing.assert_close(part[0], norm)
    check_grads(parts, grads)


def refuse(schedule, n_chunks, n_batches):
    try:
        chunks = llama_stages(make(), 8)[dist.get_rank()::4][:n_chunks]
        run_pipeline(schedule, chunks, micro_batches(n_batches), pipeline_loss(1))
    except ValueError as e:
        return str(e)


def test_what_does_not_fit_the_schedule_is_refused_before_anything_is_sent(ranks):
    s = pipeline_schedule("interleaved", 4, 4, 2)
    assert ranks(refuse, pipeline_schedule("1f1b", 3, 4), 1, 4) == ["the schedule is for 3 ranks, got 4"] * 4
    assert ranks(refuse, s, 1, 4) == ["the schedule is for 2 chunks, got 1"] * 4
    assert ranks(refuse, s, 2, 3) == ["the schedule is for 4 micro-batches, got 3"] * 4
    for n in (0, 9):
        with pytest.raises(ValueError, match=f"8 layers cannot be cut into {n} stages"):
            llama_stages(make(), n)


def order_seen():
    "The operations that `around` is entered for, and whether the input had come by then."
    seen = []
    @contextmanager
    def around(op):
        seen.append(op)
        yield
    rank, batches = dist.get_rank(), micro_batches()
    run_pipeline(pipeline_schedule("interleaved", 4, 4, 2), llama_stages(make(), 8)[rank::4], batches, loss_of(batches), around=around)
    return tuple(seen)


def test_around_sees_the_schedule(ranks):
    assert tuple(ranks(order_seen)) == pipeline_schedule("interleaved", 4, 4, 2).ops


def only_ends(frozen):
    model = make()
    model.model.embed_tokens.weight.requires_grad_(not frozen)
    chunks = llama_stages(model, 4)[dist.get_rank()::4]
    sum_tied_gradients(chunks)
    return [n for c in chunks for n, w in c.named_parameters() if w.grad is not None]


def test_ends_without_a_gradient(ranks):
    assert ranks(only_ends, False) == [["model.embed_tokens.weight"], [], [], ["lm_head.weight"]]
    assert ranks(only_ends, True) == [[]] * 4


def test_stages_hold_each_parameter_once():
    for n, tie in itertools.product((1, 2, 3, 8), (True, False)):
        model = make(tie_embeddings=tie)
        wanted = {name for name, _ in model.named_parameters()} | ({"lm_head.weight"} if n > 1 else set())
        names = [name for stage in llama_stages(model, n) for name, _ in stage.named_parameters()]
        assert sorted(names) == sorted(wanted)
