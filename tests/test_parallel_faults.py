"""Meshes of all axes against one process; ranks that die, hang, disagree or bring NaN; a job that starts again."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from llm_train_course.core import IGNORE, PaddedBatches, lm_loss, tiny_llama
from llm_train_course.parallel import (
    CollectiveFault,
    CommCounter,
    RankError,
    Ranks,
    ZeroAdamW,
    all_gather_flat,
    checked_collectives,
    clip_over_mesh,
    divide_over_mesh,
    gather_full_state,
    mesh,
    mesh_lines,
    mesh_step,
    pipeline_schedule,
    reduce_scatter_flat,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, timeout_s=60) as r:
        yield r


def heard(fn, *args):
    "What `fn` raises, as (message, ranks to blame); None if nothing."
    try:
        fn(*args)
    except CollectiveFault as e:
        return str(e), e.ranks
    return None


# Faults that leave the group whole


def total():
    x = torch.ones(2)
    dist.all_reduce(x)
    return x.tolist()


def one_does_otherwise(what, kind):
    def body():
        me = dist.get_rank()
        dist.barrier()
        with checked_collectives(3 if what == "hangs" else 40, check_finite=True):
            dist.barrier()
            x = torch.ones(3, 4)
            if me == 1 and what == "shape":
                x = torch.ones(3, 8)
            if me == 1 and what == "transposed":
                x = torch.ones(4, 3)
            if me == 1 and what == "type":
                x = x.double()
            if me == 1 and what == "hangs":
                time.sleep(5)
            if me == 1 and what == "leaves":
                return
            if me == 1 and what == "skips":
                dist.barrier()
            {
                "all_reduce": lambda: dist.all_reduce(x),
                "broadcast": lambda: dist.broadcast(x, 3 if me == 1 and what == "source" else 0),
                "reduce": lambda: dist.reduce(x, 0, dist.ReduceOp.MAX if me == 1 and what == "operation" else dist.ReduceOp.SUM),
                "all_gather": lambda: all_gather_flat(x.new_empty(4 * x.numel()), x.flatten()),
                "reduce_scatter": lambda: reduce_scatter_flat(x.new_empty(x.numel() // 4), x.flatten()),
                "barrier": dist.barrier,
            }[kind]()

    return heard(body)


@pytest.mark.parametrize(
    "what, kind, said",
    [
        ("shape", "all_reduce", "ranks 0, 2, 3 call all_reduce(float32[3, 4], SUM); rank 1 calls all_reduce(float32[3, 8], SUM)"),
        ("transposed", "broadcast", "ranks 0, 2, 3 call broadcast(float32[3, 4], src=0); rank 1 calls broadcast(float32[4, 3], src=0)"),
        ("type", "all_gather", "ranks 0, 2, 3 call all_gather(float32[48]); rank 1 calls all_gather(float64[48])"),
        ("shape", "reduce_scatter", "ranks 0, 2, 3 call reduce_scatter(float32[12], SUM); rank 1 calls reduce_scatter(float32[24], SUM)"),
        ("source", "broadcast", "ranks 0, 2, 3 call broadcast(float32[3, 4], src=0); rank 1 calls broadcast(float32[3, 4], src=3)"),
        ("operation", "reduce", "rank 1 calls reduce(float32[3, 4], MAX, dst=0)"),
        ("skips", "all_reduce", "ranks 0, 2, 3 call all_reduce(float32[3, 4], SUM); rank 1 calls barrier()"),
        ("leaves", "barrier", "rank 1 calls nothing, it has left"),
        ("hangs", "all_reduce", "#2 all_reduce(float32[3, 4], SUM): rank 1 has not come within 3 s and is alive; its last collective was #1 barrier()"),
    ],
    ids=lambda v: v if " " not in v else "",
)
def test_the_rank_and_both_collectives_are_named(ranks, what, kind, said):
    answers = ranks(one_does_otherwise, what, kind)
    others = [a for r, a in enumerate(answers) if (what, r) != ("leaves", 1)]
    assert all(a == others[0] for a in others)  # all ranks raise the same
    message, blamed = others[0]
    assert message.startswith("#2") and said in message and blamed == [1]
    assert ranks(total) == [[4, 4]] * 4  # and the group still works


def uneven(bad):
    def body():
        me = dist.get_rank()
        with checked_collectives(40):
            send, receive = [r for r in range(4)], [me] * 4
            if me == 2 and bad:
                receive = [3, 2, 1, 2]
            out = torch.empty(sum(receive), 2)
            dist.all_to_all_single(out, torch.full((6, 2), float(me)), receive, send)
            return out[:, 0].tolist()

    try:
        return body()
    except CollectiveFault as e:
        return str(e), e.ranks


def test_uneven_parts_must_fit(ranks):
    assert ranks(uneven, False) == [[], [0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
    message = "#1: all_to_all(float32): rank 0 gives [2, 2] to rank 2, which expects [3, 2]"
    assert ranks(uneven, True) == [(message, [0, 2])] * 4


def raises(timeout_s=45):
    start = time.monotonic()
    try:
        with checked_collectives(timeout_s):
            dist.barrier()
            if dist.get_rank() == 3:
                raise KeyError("lr")
            dist.all_reduce(torch.ones(1))
    except (CollectiveFault, KeyError) as e:
        return type(e).__name__, str(e), time.monotonic() - start < timeout_s


def test_a_rank_that_raises_tells_the_others_why(ranks):
    *others, own = ranks(raises)
    assert own == ("KeyError", "'lr'", True)
    assert others == [("CollectiveFault", "rank 3 raised KeyError: 'lr'; its last collective was #1 barrier()", True)] * 3  # at once


def not_finite(value, kind, check):
    x = torch.ones(8)
    if dist.get_rank() in (0, 2):
        x[1 + dist.get_rank() :] = value

    def body():
        with checked_collectives(20, check_finite=check):
            dist.all_reduce(x) if kind == "all_reduce" else reduce_scatter_flat(torch.empty(2), x)

    return heard(body)


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_traced_to_its_ranks(ranks, value, kind):
    answers = ranks(not_finite, value, kind, True)
    assert answers == [answers[0]] * 4
    assert answers[0][0].endswith("rank 0 brings 7 entries that are not finite; rank 2 brings 5 entries that are not finite")
    assert answers[0][1] == [0, 2]
    assert ranks(not_finite, value, kind, False) == [None] * 4


def in_groups():
    "Two groups work at the same time, one is at fault; the other does not notice until it meets the first."
    me = dist.get_rank()
    low, high = dist.new_group([0, 1]), dist.new_group([2, 3])
    got = []

    def body():
        with checked_collectives(40):
            for _ in range(3):
                x = torch.full((2,), float(me))
                dist.all_reduce(x, group=low if me < 2 else high)
                got.append(x[0].item())
            dist.all_reduce(torch.ones(1 if me == 3 else 2), group=low if me < 2 else high)
            dist.barrier()

    return heard(body), got


def test_numbers_count_per_group(ranks):
    answers = ranks(in_groups)
    assert [got for _, got in answers] == [[1, 1, 1]] * 2 + [[5, 5, 5]] * 2
    said = "#4 of ranks 2, 3: rank 2 calls all_reduce(float32[2], SUM); rank 3 calls all_reduce(float32[1], SUM)"
    assert [fault for fault, _ in answers] == [(said, [2, 3])] * 4  # the others learn it at their barrier


def breaks_inside():
    "All announce the same, but the collective itself fails, in a group that gives up after a second."
    group = dist.new_group(timeout=timedelta(seconds=1))

    def body():
        with checked_collectives(4) as watch:
            dist.barrier(group=group)
            if dist.get_rank() == 2:
                ask = watch.ask

                def slow(method, *args):
                    if method == "delete_key":  # agreed, and now it hangs before the collective runs
                        time.sleep(3)
                    return ask(method, *args)

                watch.ask = slow
            dist.all_reduce(torch.ones(4), group=group)

    return heard(body)


def test_a_collective_that_fails_although_all_had_announced_it(ranks):
    answers = ranks(breaks_inside)
    assert all(a is not None and "#2 all_reduce(float32[4], SUM)" in a[0] and "failed" in a[0] for a in answers)


def stopped():
    pids = [None] * 4
    dist.all_gather_object(pids, os.getpid())

    def body():
        with checked_collectives(2):
            if dist.get_rank() == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.all_reduce(torch.ones(3))

    try:
        return heard(body)
    finally:
        if dist.get_rank() == 0:
            os.kill(pids[3], signal.SIGCONT)


def test_a_stopped_rank_gives_no_sign_of_life(ranks):
    said = "#1 all_reduce(float32[3], SUM): rank 3 has not come within 2 s and gives no sign of life; it has called none before"
    assert ranks(stopped) == [(said, [3])] * 4


def clean():
    "Functions are put back, counting and checking can be nested, keys do not pile up."
    before = [getattr(dist, n) for n in ("all_reduce", "broadcast", "barrier")]
    store = dist.distributed_c10d._get_default_store()
    x = torch.ones(5)
    with CommCounter() as c, checked_collectives(20):
        dist.all_reduce(x)
    with checked_collectives(20) as watch:
        dist.barrier()
        keys = store.num_keys()
        for _ in range(20):
            dist.all_reduce(x)
        dist.barrier()
        more = store.num_keys() - keys
        work = dist.all_reduce(x, async_op=True)
        work.wait()
    after = [getattr(dist, n) for n in ("all_reduce", "broadcast", "barrier")]
    return before == after, c.calls["all_reduce"], more, dict(watch.number)


def test_it_leaves_no_trace(ranks):
    for same, counted, more, numbers in ranks(clean):
        assert same and counted == 1 and list(numbers.values()) == [23]
        assert more <= 8  # a few keys per rank, however many collectives


# Ranks that really die


def killed(who):
    dist.barrier()
    try:
        with checked_collectives(1):
            dist.barrier()
            if dist.get_rank() == who:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(2))
    except CollectiveFault as e:
        print(f"<{dist.get_rank()}: {e}>")


def test_a_killed_rank_is_named_by_the_survivors(capsys):
    doomed = Ranks(3, timeout_s=60)
    try:
        for who in (1, 0):  # rank 0 keeps the store
            with pytest.raises(RankError, match="died with exit code -9") as e:
                doomed(killed, who)
            assert e.value.rank == who
            out = capsys.readouterr().out
            for r in {0, 1, 2} - {who}:
                assert f"<{r}: #2 all_reduce(float32[2], SUM): " in out
            assert out.count("rank 1 has not come within 1 s and gives no sign of life" if who else "the store does not answer; the process that keeps it (rank 0") == 2
    finally:
        doomed.close()


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from llm_train_course.core import PaddedBatches, TrainConfig, fit, tiny_llama

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
(folder / f"started.{rank}.{os.getpid()}").touch()
examples = [{"input_ids": ids, "labels": ids} for n in range(25) for ids in [[2 + (7 * n + k * k) % 60 for k in range(4 + n % 9)]]]

class KillOnce:
    steps = 0
    def before_step(self, norm, optimizer):
        self.steps += 1
        if rank == 1 and self.steps == 5 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    def after_step(self): pass
    def row(self): return {}

for name in ("undisturbed", "disturbed"):
    if not (folder / f"{name}.pt").exists():
        model = tiny_llama(64, hidden_size=16, n_heads=2, attention_dropout=0.1)
        config = TrainConfig(learning_rate=1e-2, epochs=1, save_every=3, log_every=1, cpu=True, progress=False)
        fit(model, PaddedBatches(examples, 2, 0), config=config, run_dir=folder / name, resume=True, monitor=KillOnce() if name == "disturbed" else None)
        if rank == 0:
            torch.save(model.state_dict(), folder / f"{name}.pt")
"""


def test_torchrun_starts_again_from_the_checkpoint(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", tmp_path / "train.py", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists() and [len(list(tmp_path.glob(f"started.{r}.*"))) for r in range(2)] == [2, 2]
    a, b = (torch.load(tmp_path / f"{name}.pt") for name in ("undisturbed", "disturbed"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    start = tiny_llama(64, hidden_size=16, n_heads=2).state_dict()
    assert max(float((a[k] - start[k]).abs().max()) for k in a) > 1e-2  # and they have moved
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("undisturbed", "disturbed")]
    one, two = ([(r["step"], r["loss"], r["grad_norm"]) for r in each if "loss" in r] for each in rows)
    assert one == two and [s for s, *_ in one] == list(range(1, 8))


# Meshes


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_lines_cover_the_mesh(dp, pp, tp):
    lines = mesh_lines(dp, pp, tp)
    for axis, size in zip(("dp", "pp", "tp"), (dp, pp, tp)):
        assert sorted(r for line in lines[axis] for r in line) == list(range(dp * pp * tp))
        assert all(len(line) == size for line in lines[axis])
    where = {r: tuple(next(i for i, line in enumerate(lines[a]) if r in line) for a in lines) for r in range(dp * pp * tp)}
    assert all(np.diff(line).tolist() == [1] * (tp - 1) for line in lines["tp"])  # neighbours
    for a, b in ((x, y) for x in where for y in where if x < y):  # two lines of different axes share one rank at most
        assert sum(i == j for i, j in zip(where[a], where[b])) <= 1


def test_wrong_sizes_are_refused(ranks):
    with pytest.raises(RankError, match="3 × 1 × 1 is 3 ranks, there are 4"):
        ranks(mesh, 3, 1, 1)


OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}


def model(tied, frozen=False):
    m = tiny_llama(53, hidden_size=16, n_heads=4, n_kv_heads=2, n_layers=3, intermediate_size=19, max_length=32, tie_embeddings=tied, seed=5)
    if frozen:
        m.model.layers[0].requires_grad_(False)
        m.model.norm.requires_grad_(False)
    return m


def batches(step, n):
    g, rows = torch.Generator().manual_seed(100 + step), []
    for k in range(2 * n):
        ids = torch.randint(2, 53, (int(torch.randint(3, 12, (), generator=g)),), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE] * len(ids) if k < 2 else [IGNORE] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    layout = [PaddedBatches(rows, 2, 0, side=("left", "right")[k % 2], shuffle=False) for k in range(n)]
    return [layout[k].collate([2 * k, 2 * k + 1]) for k in range(n)]  # the first micro-batch has no target at all


def reference(tied, frozen, n, max_norm):
    m, losses, norms = model(tied, frozen), [], []
    trained = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **OPTIONS)
    for step in range(3):
        loss = sum(lm_loss(m, b) for b in batches(step, n)) / sum(b["n_targets"] for b in batches(step, n))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, max_norm).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, m.state_dict()


def composed(shape, stage_of_zero, tied, frozen, n, max_norm):
    m = mesh(*shape)
    stage = divide_over_mesh(model(tied, frozen), m)
    trained = [p for p in stage.parameters() if p.requires_grad]
    zero = ZeroAdamW(stage, stage_of_zero, group=m.group["dp"], average=False, **OPTIONS) if stage_of_zero else None
    optimizer, losses, norms = zero or torch.optim.AdamW(trained, **OPTIONS), [], []
    for step in range(3):
        mine = batches(step, n)[m.at["dp"] :: m.size["dp"]]
        schedule = pipeline_schedule("1f1b" if step else "gpipe", m.size["pp"], len(mine))
        loss, norm = mesh_step(stage, m, optimizer, schedule, mine, 53, max_norm)
        losses.append(loss.item()), norms.append(norm.item())
    with zero.gathered() if stage_of_zero == 3 else nullcontext():
        weights = gather_full_state(stage, m.group["tp"])
    m.close()
    return losses, norms, weights


@pytest.mark.parametrize(
    "shape, stage, tied, frozen, max_norm",
    [
        ((2, 1, 2), 0, True, True, 0.2),
        ((2, 2, 1), 1, True, False, 0.2),
        ((1, 2, 2), 1, True, True, 0.2),
        ((2, 2, 1), 3, False, True, 0.2),
        ((2, 1, 2), 2, True, False, 1e9),
    ],
)
def test_a_mesh_is_one_process(ranks, shape, stage, tied, frozen, max_norm):
    losses, norms, weights = reference(tied, frozen, 4, max_norm)
    assert max_norm > 1 or min(norms) > max_norm
    for got_losses, got_norms, got in ranks(composed, shape, stage, tied, frozen, 4, max_norm):
        assert got_losses == pytest.approx(losses, rel=1e-5)
        assert got_norms == pytest.approx(norms, rel=1e-5)
        for name, w in got.items():
            want = weights[name]
            assert float((w - want).abs().max() / want.abs().max()) < 1e-4, name


def test_tied_ends_and_sharded_gradients_are_refused(ranks):
    with pytest.raises(RankError, match="tied embeddings on two stages need whole gradients: ZeRO stage 2"):
        ranks(composed, (2, 2, 1), 2, True, False, 4, 1.0)


def norm_counts_once(shape, n_heads_kv):
    "All gradients are one: the squared norm is the number of parameters of the dense model."
    m = mesh(*shape)
    dense = tiny_llama(53, hidden_size=16, n_heads=4, n_kv_heads=n_heads_kv, n_layers=4, intermediate_size=19, tie_embeddings=True)
    n = sum(p.numel() for p in dense.parameters())
    stage = divide_over_mesh(dense, m)
    parts = []
    for p in stage.parameters():
        grad = torch.ones_like(p)
        if p.shape[0] == -(-53 // m.size["tp"]):  # the last rank's padding is no parameter
            grad[max(53 - m.at["tp"] * p.shape[0], 0) :] = 0
        parts.append((p, grad))
    norm = clip_over_mesh(stage, m, parts, 1e9, False)
    m.close()
    return norm.item() ** 2 / n


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2)])
def test_the_norm_counts_each_number_once(ranks, shape):
    for kv in (4, 2):  # with two heads of keys, four tensor ranks hold copies
        assert ranks(partial(norm_counts_once, shape, kv)) == pytest.approx([1.0] * 4, rel=1e-5)


def tied_over(stage_of_zero, **options):
    m = mesh(1, 4, 1)
    four_layers = tiny_llama(53, hidden_size=16, n_heads=2, n_layers=4, max_length=32)  # two stages have no end of the tied matrix
    stage = divide_over_mesh(four_layers, m)
    zero = ZeroAdamW(stage, stage_of_zero, group=m.group["dp"], **options)
    try:
        mesh_step(stage, m, zero, pipeline_schedule("1f1b", 4, 4), batches(0, 4), 53, 1.0)
    except ValueError as e:
        return str(e)
    finally:
        m.close()


def test_what_a_mesh_cannot_do_is_refused_by_all_ranks(ranks):
    assert all("tied embeddings on two stages" in said for said in ranks(partial(tied_over, 2, average=False)))
    assert all("average=False and without max_norm" in said for said in ranks(partial(tied_over, 1)))
    assert all("max_norm=1.0" in said for said in ranks(partial(tied_over, 1, average=False, max_norm=1.0)))


def test_a_rank_that_died_between_two_calls_is_named_and_the_next_call_starts_new_ones():
    with Ranks(2) as two:
        assert two(dist.get_rank) == [0, 1]
        two.workers[1][0].kill()
        two.workers[1][0].wait()
        with pytest.raises(RankError, match="rank 1: died with exit code -9") as e:
            two(dist.get_rank)
        assert e.value.rank == 1
        assert two(dist.get_rank) == [0, 1]
