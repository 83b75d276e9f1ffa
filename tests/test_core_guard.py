"A guard refuses updates: what is left is the run whose data never had the batch, also after a rollback, a kill, and on two ranks."
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, ROWS, flat, killed_until_done, model, on_two_ranks

from llm_train_course.core import PaddedBatches, SpikeError, fit, lm_loss

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
    assert refusal == [{"step": began, "refused": [0, window], "why": refusal[0]["why"]}] and refusal[0]["why"].startswith("loss ")
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
