"FP8 and 16-bit weights through `fit`: the layers are changed for the run and put back, and a resumed run is the same to the last bit."
import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, ROWS, flat, model, on_two_ranks
from torch import nn
from transformers import AutoModelForCausalLM

from llm_train_course.core import (
    FP8_RECIPES,
    NonFiniteLoss,
    PaddedBatches,
    PrecisionWarning,
    ResumeError,
    TrainConfig,
    adamw,
    evaluate,
    fit,
    lm_loss,
)
from llm_train_course.lora import LoRALinear, add_lora, lora_layers
from llm_train_course.precision import E4M3, E5M2, FP8Linear, FP8Recipe, from_fp8, to_fp8
from llm_train_course.qlora import quantize_model
from llm_train_course.stability import SpikeDetector

pytestmark = pytest.mark.filterwarnings("ignore:precision fp8 is simulated")
FP8 = replace(CONFIG, precision="fp8", max_steps=6)
DROPOUT = {"attention_dropout": 0.2}
BY_HAND = {"tensor": FP8Recipe("tensor", E4M3, E5M2), "row": FP8Recipe("row", E4M3, E4M3), "block": FP8Recipe("block", E4M3, E4M3),
           "mx": FP8Recipe("mx", E4M3, E4M3), "delayed": FP8Recipe("tensor", E4M3, E5M2, delayed=True)}


def kinds(m):
    return {type(part) for part in m.modules() if isinstance(part, nn.Linear)}


def stopped_and_resumed(make, layout, config, folder, at=4, **options):
    "A run that ends at a step, and goes on in a new model."
    class Stop(Exception):
        pass

    calls = [at * config.grad_accum_steps]

    def counted(m, batch):
        calls[0] -= 1
        if calls[0] < 0:
            raise Stop
        return lm_loss(m, batch)

    first = make()
    with pytest.raises(Stop):
        fit(first, layout, counted, config, run_dir=folder, **options)
    assert FP8Linear not in kinds(first)
    got = make()
    return got, fit(got, layout, config=config, run_dir=folder, resume=True, **options)


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_it_is_chapter_eight_by_hand(name):
    layout, want, got = PaddedBatches(ROWS, 2), model(**DROPOUT), model(**DROPOUT)
    to_fp8(want, BY_HAND[name])
    fit(want, layout, config=replace(FP8, precision="bf16"))
    from_fp8(want)
    seen = []

    def looking(m, batch):
        seen.append((sum(type(part) is FP8Linear for part in m.modules()), type(m.lm_head), next(iter(m.parameters())).dtype))
        return lm_loss(m, batch)

    fit(got, layout, looking, replace(FP8, fp8_recipe=name))
    assert set(seen) == {(14, nn.Linear, torch.float32)}
    assert torch.equal(flat(got), flat(want)) and kinds(got) == {nn.Linear}
    assert got.state_dict().keys() == model().state_dict().keys() and not any(vars(part).get("recipe") for part in got.modules())
    plain = model(**DROPOUT)
    fit(plain, layout, config=replace(FP8, precision="bf16"))
    assert 1e-6 < float((flat(got) - flat(plain)).abs().max()) < 0.05  # another arithmetic, not another run


@pytest.mark.parametrize("name", FP8_RECIPES)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_resumed_to_the_bit(name, checkpointing, tmp_path):
    layout, make = PaddedBatches(ROWS, 1), lambda: model(**DROPOUT)
    config = replace(FP8, fp8_recipe=name, checkpointing=checkpointing, save_every=3, grad_accum_steps=2)
    want = make()
    fit(want, layout, config=config)
    got, result = stopped_and_resumed(make, layout, config, tmp_path)
    assert result.step == 6 and result.history[0]["step"] == 4 and torch.equal(flat(got), flat(want))
    with pytest.raises(ResumeError, match="fp8_recipe"):
        fit(make(), layout, config=replace(config, fp8_recipe="tensor" if name == "row" else "row"), run_dir=tmp_path, resume=True)


def test_recomputation_changes_nothing_with_histories_of_scales():
    runs = [model(**DROPOUT) for _ in range(2)]
    for m, how in zip(runs, ("none", "full")):
        fit(m, PaddedBatches(ROWS, 2), config=replace(FP8, fp8_recipe="delayed", checkpointing=how))
    assert torch.equal(*map(flat, runs))


def test_other_precisions_do_not_look_at_the_recipe(tmp_path):
    "A checkpoint from before there was the field goes on."
    layout = PaddedBatches(ROWS, 2)
    fit(model(), layout, config=replace(CONFIG, max_steps=4, save_every=2), run_dir=tmp_path)
    meta = json.loads((tmp_path / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert "train.fp8_recipe" not in meta["identity"] and meta["identity"]["train.precision"] == "fp32"


@pytest.mark.parametrize("where", ["loss", "gradient", "resume", "batches"])
def test_layers_are_put_back_when_the_run_fails(where, tmp_path):
    m, layout = model(), PaddedBatches(ROWS, 2)
    bad = {"loss": lambda m, b: lm_loss(m, b) * float("nan"), "gradient": lambda m, b: (lm_loss(m, b) - lm_loss(m, b).detach()).sqrt()}.get(where, lm_loss)
    if where == "batches":
        layout.collate = lambda rows: 1 / 0
    if where == "resume":
        fit(model(), layout, config=replace(CONFIG, max_steps=2, save_every=1), run_dir=tmp_path)
    with pytest.raises((NonFiniteLoss, ResumeError, ZeroDivisionError)):
        fit(m, layout, bad, replace(FP8, fp8_recipe="delayed"), run_dir=tmp_path, resume=where == "resume")
    assert kinds(m) == {nn.Linear} and not [n for n, _ in m.named_buffers() if "amax" in n]


def test_what_is_saved_loads_as_an_ordinary_model(tmp_path):
    m = model()
    fit(m, PaddedBatches(ROWS, 2), config=replace(FP8, fp8_recipe="delayed"))
    m.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(flat(back), flat(m)) and kinds(back) == {nn.Linear}
    layout = PaddedBatches(ROWS, 2, shuffle=False)
    assert evaluate(back, layout)["loss"] == evaluate(m, layout)["loss"]


def test_evaluation_on_the_way_is_in_the_arithmetic_of_the_run():
    layout, held = PaddedBatches(ROWS, 2), PaddedBatches(ROWS, 2, shuffle=False)
    by_hand, seen = model(), {}
    for name in ("bf16", "fp8"):
        seen[name] = fit(model(), layout, config=replace(FP8, precision=name, learning_rate=0.0, max_steps=1), eval_batches=held).history[-1]["eval_loss"]
    to_fp8(by_hand, BY_HAND["row"])
    with torch.autocast("cpu", torch.bfloat16):
        want = evaluate(by_hand, held)["loss"]
    assert seen["fp8"] == want != seen["bf16"]


def test_adapters_stay_and_their_frozen_base_is_in_eight_bits(tmp_path):
    def make():
        m = model(**DROPOUT)
        torch.manual_seed(0)
        add_lora(m, r=3, alpha=7)
        return m

    layout, config = PaddedBatches(ROWS, 2), replace(FP8, save_every=3, fp8_recipe="delayed")
    seen, want = set(), make()

    def looking(m, batch):
        seen.update((type(layer), type(layer.base_layer)) for layer in lora_layers(m).values())
        return lm_loss(m, batch)

    frozen = {n: p.clone() for n, p in want.named_parameters() if not p.requires_grad}
    fit(want, layout, looking, config)
    assert seen == {(LoRALinear, FP8Linear)}
    assert all(torch.equal(p, frozen[n]) for n, p in want.named_parameters() if n in frozen)
    got, result = stopped_and_resumed(make, layout, config, tmp_path)
    assert torch.equal(flat(got), flat(want)) and kinds(got) == {nn.Linear}


def test_adapters_of_peft_stay_too():
    from peft import LoraConfig, get_peft_model
    m, seen = get_peft_model(model(), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])), {}

    def looking(m, batch):
        seen.update({name: type(part) for name, part in m.named_modules() if isinstance(part, nn.Linear)})
        return lm_loss(m, batch)

    fit(m, PaddedBatches(ROWS, 2), looking, replace(FP8, max_steps=2))
    eight = {name for name, kind in seen.items() if kind is FP8Linear}
    assert len(eight) == 14 and not any("lora_" in name for name in eight)
    assert sum(name.endswith("base_layer") for name in eight) == 4 and kinds(m) == {nn.Linear}


def test_refusals_leave_the_model_alone(monkeypatch):
    layout = PaddedBatches(ROWS, 2)
    m = model()
    to_fp8(m)
    with pytest.raises(ValueError, match="has FP8 layers already"):
        fit(m, layout, config=FP8)
    assert FP8Linear in kinds(m)
    m = model()
    quantize_model(m)
    add_lora(m, r=3, alpha=7)
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="no plain linear layer in the blocks"):
        fit(m, layout, config=FP8)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    with pytest.raises(ValueError, match="guard: with fp8_recipe delayed"):
        fit(model(), layout, config=replace(FP8, fp8_recipe="delayed"), guard=SpikeDetector())
    with pytest.raises(ValueError, match="no blocks"):
        fit(nn.Linear(3, 3), layout, config=FP8)
    for value in ("rows", "", "FP8"):
        with pytest.raises(ValueError, match=f"fp8_recipe must be one of tensor, row, block, mx, delayed, got '{value}'"):
            TrainConfig(fp8_recipe=value)
    with pytest.raises(ValueError, match="precision must be fp32, bf16, fp16 or fp8, got 'int8'"):
        TrainConfig(precision="int8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="precision fp8 runs on one process or several through DDP"):
        fit(model(), layout, config=FP8)


def test_a_guard_refuses_as_if_the_batch_had_never_been():
    "With scales of the moment nothing in the layers remembers what was refused."
    class Second:
        def __init__(self):
            self.n = 0

        def update(self, loss, norm):
            self.n += 1
            return self.n == 2

    class Without:
        def __init__(self, layout):
            self.layout, self.collate = layout, layout.collate

        def plan(self, epoch):
            return [item for n, item in enumerate(self.layout.plan(epoch)) if epoch or n != 1]

    got, want = model(), model()
    fit(got, PaddedBatches(ROWS, 2), config=FP8, guard=Second())
    fit(want, Without(PaddedBatches(ROWS, 2)), config=FP8)
    assert torch.equal(flat(got), flat(want))


@pytest.mark.filterwarnings("default:precision fp8 is simulated")
def test_it_says_once_that_it_is_simulated():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(model(), PaddedBatches(ROWS, 2), config=replace(FP8, max_steps=2))
        fit(model(), PaddedBatches(ROWS, 2), config=replace(CONFIG, max_steps=2))
    told = [w for w in said if issubclass(w.category, PrecisionWarning)]
    assert len(told) == 1 and "compute capability 8.9" in str(told[0].message) and told[0].filename == __file__


def test_the_kernel_is_asked_for_where_there_is_one(monkeypatch):
    from llm_train_course.core import _fp8_recipe
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, kernel in (((8, 9), True), ((9, 0), True), ((8, 6), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a, c=capability: c)
        for name in FP8_RECIPES:
            backend = _fp8_recipe(replace(FP8, cpu=False, fp8_recipe=name)).backend
            assert backend == ("scaled_mm" if kernel and name in ("tensor", "row", "delayed") else "simulated")
        assert _fp8_recipe(FP8).backend == "simulated"  # told to stay on the CPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8")
@pytest.mark.parametrize("name", ["tensor", "row", "delayed"])
def test_on_a_gpu_it_is_near_the_simulation(name):
    runs = {}
    for cpu in (True, False):
        m = model()
        runs[cpu] = fit(m, PaddedBatches(ROWS, 2), config=replace(FP8, cpu=cpu, fp8_recipe=name)).history
    for a, b in zip(runs[True], runs[False]):
        assert abs(a["loss"] - b["loss"]) < 0.05


# ------------------------------------------------------------------------------------------------------------------------
# weights of 16 bits
# ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["adamw_stochastic", "adamw_kahan"])
def test_rounded_weights_train_and_resume_to_the_bit(name, tmp_path):
    make, layout = lambda: model(**DROPOUT).bfloat16(), PaddedBatches(ROWS, 1)
    config = replace(CONFIG, optimizer=name, learning_rate=1e-5, max_steps=6, save_every=2, grad_accum_steps=2)
    want, start = make(), flat(make())
    fit(want, layout, config=config)
    got, result = stopped_and_resumed(make, layout, config, tmp_path, at=3)
    assert result.history[0]["step"] == 3 and torch.equal(flat(got), flat(want)) and next(got.parameters()).dtype == torch.bfloat16
    seeds, nearest = [model().bfloat16() for _ in range(2)], make()
    for seed, m in enumerate(seeds):  # without dropout, only the rounding draws
        fit(m, layout, config=replace(config, seed=seed))
    assert torch.equal(*map(flat, seeds)) == (name == "adamw_kahan")
    fit(nearest, layout, config=replace(config, optimizer="adamw"))
    moved = [float((flat(m) != start).float().mean()) for m in (want, nearest)]
    assert moved[0] > 1.5 * moved[1], moved  # torch's AdamW rounds to nearest: small updates are lost


def test_sixteen_bit_optimizers_refuse_weights_that_need_none():
    with pytest.raises(ValueError, match="what is trained here is float32: load the model in bfloat16, or use adamw"):
        adamw(model(), TrainConfig(optimizer="adamw_kahan"))
    m = model().bfloat16()
    add_lora(m, r=2, alpha=4)  # adapters are float32 on a base of 16 bits
    with pytest.raises(ValueError, match="adamw_stochastic rounds updates of 16-bit weights"):
        adamw(m, TrainConfig(optimizer="adamw_stochastic"))


# ------------------------------------------------------------------------------------------------------------------------
# two processes
# ------------------------------------------------------------------------------------------------------------------------
def _worker(rank, folder):
    warnings.simplefilter("ignore")
    config = replace(FP8, max_steps=4, grad_accum_steps=2, save_every=2)
    for name in ("row", "delayed"):
        m = model(n_layers=1)
        fit(m, PaddedBatches(ROWS, 1), config=replace(config, fp8_recipe=name), run_dir=f"{folder}/{name}")
        torch.save(flat(m), f"{folder}/{name}-{rank}.pt")
        again = model(n_layers=1)
        _drop_last(rank, f"{folder}/{name}")
        result = fit(again, PaddedBatches(ROWS, 1), config=replace(config, fp8_recipe=name), run_dir=f"{folder}/{name}", resume=True)
        assert result.history[0]["step"] == 3 and torch.equal(flat(again), flat(m))
    m = model(n_layers=1).bfloat16()
    fit(m, PaddedBatches(ROWS, 1), config=replace(config, precision="fp32", optimizer="adamw_stochastic"))
    torch.save(flat(m), f"{folder}/stochastic-{rank}.pt")


def _drop_last(rank, folder):
    import shutil
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(f"{folder}/checkpoints/step_00000004")
    torch.distributed.barrier()


def test_two_processes(tmp_path):
    on_two_ranks(_worker, tmp_path)
    for name in ("row", "delayed", "stochastic"):
        one, two = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert torch.equal(one, two)
    want = model(n_layers=1)
    fit(want, PaddedBatches(ROWS, 1), config=replace(FP8, max_steps=4, grad_accum_steps=4))
    one = torch.load(tmp_path / "row-0.pt", weights_only=True)
    torch.testing.assert_close(one, flat(want), rtol=0, atol=1e-3)  # a row each: the same codes, summed in another order
