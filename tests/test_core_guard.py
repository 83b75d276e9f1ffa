"A guard refuses updates: what is left is the run whose data never had the batch, also after a rollback, a kill, and on two ranks."
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, ROWS, flat, killed_until_done, model, on_two_ranks

from llm_train_course.core import PaddedBatches, ResumeError, SpikeError, fit, lm_loss
from llm_train_course.precision import FP8Recipe, to_fp8
from llm_train_course.stability import Monitor, SpikeDetector

DROPOUT = {"attention_dropout": 0.2}
STRANGE = {"input_ids": [3, 17, 5, 11, 2, 9], "labels": [3, 17, 5, 11, 2, 9]}  # the row that spoils its global batch
DATA = [*ROWS, *({k: v[:-1] for k, v in row.items()} for row in ROWS), STRANGE]


class Limit:
    "Refuses a loss above three times the mean of those it let through."

    def __init__(self, rollback=0):
        self.rollback, self._sum, self._n = rollback, 0.0, 0

    def update(self, loss, grad_norm):
        if self._n and loss > 3 * self._sum / self._n:
            return f"loss {loss:.3g}"
        self._sum, self._n = self._sum + loss, self._n + 1

    def state_dict(self):
        return {"sum": self._sum, "n": self._n}

    def load_state_dict(self, state):
        self._sum, self._n = state["sum"], state["n"]


def spoiled(m, batch, factor=50.0):
    "The language model's loss, fifty times as large where the strange row is."
    width = len(STRANGE["input_ids"])
    here = batch["input_ids"].shape[1] >= width and (batch["input_ids"][:, :width] == torch.tensor(STRANGE["input_ids"])).all(-1).any()
    return lm_loss(m, batch) * (factor if here else 1.0)


class Lacking(PaddedBatches):
    "Without some micro-batches of the first epoch."
    gone = ()

    def plan(self, epoch=0):
        return [item for n, item in enumerate(super().plan(epoch)) if epoch or n not in self.gone]


def spoiled_window(layout, size):
    number = next(n for n, item in enumerate(layout.plan(0)) if len(DATA) - 1 in item)
    assert number >= 5 * size  # there is something to roll back
    return number // size


@pytest.mark.parametrize("rollback,save_every", [(0, None), (1, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize("accum", [1, 2])
def test_a_refused_batch_has_never_been(tmp_path, rollback, save_every, accum):
    layout = PaddedBatches(DATA, 1, seed=6)
    config = replace(CONFIG, max_steps=6 if accum == 2 else 14, grad_accum_steps=accum, save_every=save_every, keep_checkpoints=6)
    window = spoiled_window(layout, accum)
    began = (window - rollback) // save_every * save_every if rollback else window
    got = model(**DROPOUT)
    run = tmp_path if save_every else None
    result = fit(got, layout, spoiled, config, run_dir=run, guard=Limit(rollback))
    lacking = Lacking(DATA, 1, seed=6)
    lacking.gone = range(began * accum, (window + 1) * accum)
    want = model(**DROPOUT)
    whole = fit(want, lacking, spoiled, config)
    assert torch.equal(flat(got), flat(want)) and result.step == config.max_steps
    refusal = [row for row in result.history if "refused" in row]
    assert refusal == [{"step": began, "refused": [0, window], "undone": window - began, "why": refusal[0]["why"]}] and refusal[0]["why"].startswith("loss ")
    plain = [{k: v for k, v in row.items() if k not in ("targets_per_second", "epoch")} for row in result.history if "loss" in row]
    assert plain == [{k: v for k, v in row.items() if k not in ("targets_per_second", "epoch")} for row in whole.history]
    if run:
        assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == result.history


def test_without_a_guard_the_same_batch_does_harm():
    layout = PaddedBatches(DATA, 1, seed=6)
    harmed, spared = model(), model()
    config = replace(CONFIG, max_steps=14, max_grad_norm=None)
    fit(harmed, layout, spoiled, config)
    fit(spared, layout, spoiled, config, guard=Limit())
    assert not torch.equal(flat(harmed), flat(spared))


@pytest.mark.parametrize("rollback", [0, 3])
def test_killed_at_random_moments_it_refuses_and_rolls_back_to_the_same_weights_and_rows(tmp_path, rollback):
    layout, config = PaddedBatches(DATA, 1, seed=6), replace(CONFIG, max_steps=14, save_every=2, keep_checkpoints=4)
    want = model(**DROPOUT)
    fit(want, layout, spoiled, config, run_dir=tmp_path / "whole", guard=Limit(rollback))
    run = tmp_path / "killed"
    killed_until_done(lambda counted: fit(model(**DROPOUT), layout, counted(spoiled), config, run_dir=run, resume=True, guard=Limit(rollback)),
                      (1, 30), least=4)
    got = model(**DROPOUT)
    fit(got, layout, spoiled, config, run_dir=run, resume=True, guard=Limit(rollback))
    assert torch.equal(flat(got), flat(want))
    rows = [[{k: v for k, v in json.loads(line).items() if k != "targets_per_second"} for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (tmp_path / "whole", run)]
    assert rows[0] == rows[1] and sum("refused" in row for row in rows[0]) == 1


def test_what_is_not_finite_is_refused_whatever_the_guard_says():
    class Content(Limit):
        def update(self, loss, grad_norm):
            return None

    layout, config = PaddedBatches(DATA, 1, seed=6), replace(CONFIG, max_steps=12)
    m = model()
    result = fit(m, layout, lambda *a: spoiled(*a, factor=float("nan")), config, guard=Content())
    assert flat(m).isfinite().all() and [row["why"][:8] for row in result.history if "refused" in row] == ["loss nan"]
    calls = []
    with pytest.raises(SpikeError, match=r"refused 11 updates in a row, the last one at step 2 \(epoch 0, global batch 12\)"):
        fit(m, layout, lambda *a: calls.append(1) or lm_loss(*a) * (1.0 if len(calls) < 3 else math.inf), config, guard=Content())


def test_an_epoch_with_a_refused_batch_ends_with_its_data():
    result = fit(model(), PaddedBatches(DATA, 1, seed=6), spoiled, replace(CONFIG, max_steps=None, epochs=2), guard=Limit())
    assert result.step == 2 * len(DATA) - 2 and sum("refused" in row for row in result.history) == 2
    assert [row["refused"][0] for row in result.history if "refused" in row] == [0, 1]


def test_live_data_are_not_made_again_for_a_refusal_and_come_back_with_a_rollback(tmp_path):
    class Live(PaddedBatches):
        "Which rows stand together depends on the weights, so that data made again would be others."
        made, _now = 0, None

        def plan(self, epoch=0):
            if self._now is None or self._now[0] != epoch:
                order = torch.argsort(torch.sin(1e4 * flat(self._model)[:len(self.examples) - 1])).tolist()
                order.insert(9, len(self.examples) - 1)  # the strange row is the tenth
                self._now, Live.made = (epoch, order), Live.made + 1
            return [[n] for n in self._now[1]]

        def state_dict(self):
            return {"now": self._now}

        def load_state_dict(self, state):
            self._now = tuple(state["now"])

    for rollback in (0, 2):
        m, layout = model(), Live(DATA, 1)
        layout._model, Live.made = m, 0
        config = replace(CONFIG, max_steps=30, save_every=2, keep_checkpoints=3)
        result = fit(m, layout, spoiled, config, run_dir=tmp_path / str(rollback), guard=Limit(rollback))
        assert sum("refused" in row for row in result.history) == 2 and Live.made == 2  # one for each epoch begun


def test_bad_settings_are_named(tmp_path):
    layout = PaddedBatches(DATA, 1)
    with pytest.raises(ValueError, match="rollback=3 needs run_dir and save_every"):
        fit(model(), layout, config=CONFIG, guard=Limit(3))
    with pytest.raises(ValueError, match="rollback=3 is more than save_every=2 times keep_checkpoints=2 less one"):
        fit(model(), layout, config=replace(CONFIG, save_every=2), run_dir=tmp_path, guard=Limit(3))


class At(PaddedBatches):
    "The strange row, once or several times, at these places of each epoch."
    places = (-1,)

    def plan(self, epoch=0):
        order = [item for item in super().plan(epoch) if len(DATA) - 1 not in item]
        for place in self.places:
            order.insert(place if place >= 0 else len(order), [len(DATA) - 1])
        return order


def at(*places):
    layout = At(DATA, 1, seed=6)
    layout.places = places
    return layout


def steps_of(rows, key):
    return [row["step"] for row in rows if key in row]


def test_a_run_whose_last_batch_is_refused_or_passed_over_tells_its_end(tmp_path):
    config = replace(CONFIG, max_steps=None, epochs=1, log_every=4, save_every=4, eval_every=6, keep_checkpoints=3)
    held = PaddedBatches(ROWS, 2)
    n = len(DATA) - 1
    last = f"step_{n:08d}"
    rows = fit(model(), at(-1), spoiled, config, eval_batches=held, run_dir=tmp_path / "last", guard=Limit()).history
    assert steps_of(rows, "refused") == [n] and steps_of(rows, "loss") == [1, 4, 8, 12, 16, n] and steps_of(rows, "eval_loss") == [6, 12, 18]
    assert sorted(p.name for p in (tmp_path / "last" / "checkpoints").iterdir())[-1] == last
    plain = fit(model(), at(), spoiled, config, eval_batches=held).history  # its schedule is one step shorter: the numbers differ, not the rows
    told = lambda rows: sorted((row["step"], row.get("n_targets", 0)) for row in rows if "refused" not in row)
    assert told(rows) == told(plain)
    rows = fit(model(), at(16), spoiled, config, eval_batches=held, run_dir=tmp_path / "passed", guard=Limit(8)).history  # back to 8, then 17 and 18 are left
    assert steps_of(rows, "refused") == [8] and steps_of(rows, "loss")[-1] == steps_of(rows, "eval_loss")[-1] == 10
    rows = fit(model(), at(-1), spoiled, replace(config, log_every=3), eval_batches=held, run_dir=tmp_path / "back", guard=Limit(8)).history
    assert steps_of(rows, "loss") == [1, 3, 6, 8] and steps_of(rows, "eval_loss") == [6, 8]  # nothing is left behind step 8
    want = fit(model(), at(), spoiled, replace(config, max_steps=n + 1, log_every=1)).history
    assert {k: rows[-2][k] for k in ("lr", "grad_norm")} == {k: want[7][k] for k in ("lr", "grad_norm")}


@pytest.mark.parametrize("rollback,keep,moment", [(4, 2, 10), (1, 4, 9), (4, 2, 13)])
def test_an_interruption_is_no_place_to_go_back_to_and_takes_the_place_of_none(tmp_path, rollback, keep, moment):
    layout, config = at(10), replace(CONFIG, max_steps=14, save_every=4, keep_checkpoints=keep)
    want, got, calls = model(**DROPOUT), model(**DROPOUT), []
    whole = fit(want, layout, spoiled, config, run_dir=tmp_path / "whole", guard=Limit(rollback))

    def interrupted(m, batch):
        calls.append(1)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGINT)
        return spoiled(m, batch)

    first = fit(model(**DROPOUT), layout, interrupted, config, run_dir=tmp_path / "cut", guard=Limit(rollback))
    assert first.interrupted and first.step < 14
    fit(got, layout, spoiled, config, run_dir=tmp_path / "cut", resume=True, guard=Limit(rollback))
    assert torch.equal(flat(got), flat(want))
    refused = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines() if "refused" in line]
    assert refused == [row for row in whole.history if "refused" in row] and refused[0]["undone"] > 0


def stopping(micro_batch):
    calls = []

    def stopped(m, batch):
        calls.append(1)
        if len(calls) == micro_batch:
            raise RuntimeError("stopped")
        return spoiled(m, batch)
    return stopped


@pytest.mark.parametrize("rollback", [0, 4])
def test_a_resumed_run_keeps_its_guard_and_with_a_rollback_the_places_of_its_checkpoints(tmp_path, rollback):
    layout, config = at(10), replace(CONFIG, max_steps=14, save_every=4, keep_checkpoints=2)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(model(), layout, stopping(6), config, run_dir=tmp_path, guard=Limit(rollback))
    with pytest.raises(ResumeError, match="made with guard = .'Limit', .*, this run has None"):
        fit(model(), layout, spoiled, config, run_dir=tmp_path, resume=True)
    other = lambda: fit(model(), layout, spoiled, replace(config, save_every=2, keep_checkpoints=4), run_dir=tmp_path, resume=True, guard=Limit(rollback))
    if rollback:
        with pytest.raises(ResumeError, match=r"made with save_every, keep_checkpoints = \[4, 2\], this run has \[2, 4\]"):
            other()
    else:
        assert other().step == 14


def test_a_rollback_that_finds_no_checkpoint_says_so_and_no_refusal_is_forgotten(tmp_path):
    refusals = lambda *places, **kw: [(row["step"], row["refused"][1], row["undone"]) for row in fit(
        model(), at(*places), spoiled, replace(CONFIG, max_steps=12, **kw), run_dir=tmp_path / str(places), guard=Limit(rollback)).history if "refused" in row]
    rollback = 4
    assert refusals(3, save_every=4, keep_checkpoints=2) == [(3, 3, 0)]
    assert refusals(9, 11, save_every=4, keep_checkpoints=2) == [(4, 9, 5), (5, 11, 0)]
    rollback = 2
    assert refusals(8, 10, save_every=2, keep_checkpoints=6) == [(6, 8, 2), (4, 10, 3)]
    kept = [json.loads(line) for line in (tmp_path / "(8, 10)" / "metrics.jsonl").read_text().splitlines()]
    assert [row["refused"] for row in kept if "refused" in row] == [[0, 8], [0, 10]]


def test_buffers_that_a_refused_forward_pass_wrote_are_put_back():
    ends = []
    for places, guard in (((10,), Limit()), ((), None)):
        m = model()
        to_fp8(m, FP8Recipe(delayed=True))
        fit(m, at(*places), spoiled, replace(CONFIG, max_steps=14), guard=guard)
        ends.append((flat(m), torch.cat([b.flatten().float() for name, b in m.named_buffers() if "amax" in name])))
    assert ends[0][1].numel() > 0 and torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


def loud(factor):
    "The spoiled loss, and queries of the strange row that are not what they should be."
    def loss(m, batch):
        strange = batch["input_ids"].shape == (1, len(STRANGE["input_ids"])) and batch["input_ids"][0].tolist() == STRANGE["input_ids"]
        hook = m.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: out * (factor if strange else 1.0), prepend=True)
        try:
            return spoiled(m, batch)
        finally:
            hook.remove()
    return loss


def watched(layout, config, every, loss=spoiled, run_dir=None, resume=False, guard=None):
    m = model()
    with Monitor(m, every=every) as monitor:
        rows = fit(m, layout, loss, config, run_dir=run_dir, resume=resume, guard=guard, monitor=monitor).history
    return [{k: v for k, v in row.items() if k not in ("targets_per_second", "epoch")} for row in rows if "loss" in row]


@pytest.mark.parametrize("factor", [math.nan, 1000.0])
def test_what_a_refused_batch_did_is_not_in_the_rows_of_a_monitor(factor):
    want = watched(at(), replace(CONFIG, max_steps=13), 1)
    assert watched(at(10), replace(CONFIG, max_steps=13), 1, loud(factor), guard=Limit()) == want and len(want) == 13
    config = replace(CONFIG, max_steps=None, epochs=1, log_every=4)  # the last one: the row is written behind the refusal
    rows, want = (watched(at(*places), config, 1, loud(factor), guard=Limit()) for places in ((-1,), ()))
    assert [row["step"] for row in rows] == [1, 4, 8, 12, 16, 18] and all(math.isfinite(row["max_logit"]) and row["max_logit"] < 5 for row in rows)
    assert rows[-1].keys() == want[-1].keys()


@pytest.mark.parametrize("every", [1, 3])
def test_a_monitor_goes_back_with_the_run_and_goes_on_with_it(tmp_path, every):
    config = replace(CONFIG, max_steps=13, log_every=3, save_every=3, keep_checkpoints=4)
    lacking = at()
    undone = watched(at(10), config, every, loud(1000.0), tmp_path / "back", guard=Limit(2))
    plan, lacking.plan = at(10).plan, lambda epoch=0: [item for n, item in enumerate(plan(epoch)) if epoch or not 6 <= n <= 10]
    assert undone == watched(lacking, config, every)
    want, config = watched(at(), config, every), replace(config, save_every=1)
    with pytest.raises(RuntimeError, match="stopped"):
        watched(at(), config, every, stopping(9), tmp_path / "cut")
    rows = watched(at(), config, every, run_dir=tmp_path / "cut", resume=True)
    assert rows[1:] == want[-len(rows) + 1:] and rows[-1]["update_ratio"] > 0
    if every == 3:
        assert rows == want[-len(rows):]  # what is measured is what is logged


def test_a_new_level_is_learned_without_a_rollback_and_ends_the_run_with_one(tmp_path):
    def shifted():
        calls = []
        return lambda m, batch: calls.append(1) or lm_loss(m, batch) * (1.0 if len(calls) <= 10 else 10.0)

    layout, config = PaddedBatches(ROWS * 20, 1, seed=1), replace(CONFIG, max_steps=16, learning_rate=1e-4)
    guard = lambda rollback: SpikeDetector(window=8, warmup=4, patience=4, rollback=rollback)
    result = fit(model(), layout, shifted(), config, guard=guard(0))
    assert result.step == 16 and 4 <= sum("refused" in row for row in result.history) < 10
    assert not any(row["why"].startswith("step ") for row in result.history if "refused" in row)  # the row has a step
    with pytest.raises(SpikeError, match="refused 5 updates in a row"):
        fit(model(), layout, shifted(), replace(config, save_every=1), run_dir=tmp_path, guard=guard(1))


def _worker(rank, folder):
    for rollback in (0, 2):
        m = model()
        config = replace(CONFIG, max_steps=7, save_every=1, keep_checkpoints=4)
        result = fit(m, PaddedBatches(DATA, 1, seed=6), spoiled, config, run_dir=f"{folder}/run-{rollback}", guard=Limit(rollback))
        torch.save({"weights": flat(m), "refused": [row["refused"] for row in result.history if "refused" in row]}, f"{folder}/{rollback}-{rank}.pt")


def test_two_processes_refuse_what_one_refuses(tmp_path):
    on_two_ranks(_worker, tmp_path)
    for rollback in (0, 2):
        want = model()
        config = replace(CONFIG, max_steps=7, grad_accum_steps=2, save_every=1, keep_checkpoints=4)
        result = fit(want, PaddedBatches(DATA, 1, seed=6), spoiled, config, run_dir=tmp_path / f"one-{rollback}", guard=Limit(rollback))
        for rank in (0, 1):
            got = torch.load(tmp_path / f"{rollback}-{rank}.pt", weights_only=True)
            torch.testing.assert_close(got["weights"], flat(want), rtol=0, atol=2e-6)
            assert got["refused"] == [row["refused"] for row in result.history if "refused" in row] and len(got["refused"]) == 1


def test_a_monitor_is_called_around_every_step_and_its_row_is_logged(tmp_path):
    class Moved:
        "How far the weights went since the last row, and what it was told."
        def __init__(self, m):
            self.m, self.calls, self.norms = m, 0, []

        def before_step(self, grad_norm, optimizer):
            self.norms.append(grad_norm)
            self.grad = sum(float(p.grad.square().sum()) for p in self.m.parameters()) ** 0.5
            self.old, self.lr = flat(self.m), optimizer.param_groups[0]["lr"]

        def after_step(self):
            self.calls += 1
            self.moved = float((flat(self.m) - self.old).norm())

        def row(self):
            return {"moved": self.moved, "clipped": self.grad}

    watched, alone = model(), model()
    config, monitor = replace(CONFIG, log_every=2, max_grad_norm=0.5), Moved(watched)
    rows = fit(watched, PaddedBatches(ROWS, 2), config=config, run_dir=tmp_path, monitor=monitor).history
    fit(alone, PaddedBatches(ROWS, 2), config=config)
    assert torch.equal(flat(watched), flat(alone)) and monitor.calls == 9
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 8, 9] and all(row["moved"] > 0 for row in rows)
    assert all(row["clipped"] == pytest.approx(min(row["grad_norm"], 0.5), rel=1e-3) for row in rows)
    assert monitor.norms[-1] == rows[-1]["grad_norm"]
    assert "moved" in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
