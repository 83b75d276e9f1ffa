"""Tests that take an implementation. Each says in one sentence what must hold; `OURS` names the code of this course that it is run on.

A catcher raises AssertionError on a wrong implementation, and nothing else: an implementation that crashes for another
reason has not been caught but is broken in a way the catcher did not mean.
"""
import copy
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers import CONFIG, ROWS, TOKENIZER, flat
from helpers import model as tiny
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel

from llm_train_course import core, stability
from llm_train_course.core import (
    IGNORE,
    PackedBatches,
    PaddedBatches,
    TrainConfig,
    encode_messages,
    fit,
    lm_loss,
    token_logps,
)
from llm_train_course.dpo import PreferenceBatches, encode_pair, reference_logps
from llm_train_course.lora import LoRALinear
from llm_train_course.qlora import nf4_levels
from llm_train_course.rlhf import ppo_clip_loss, whiten

OURS = {}


def caught_on(ours):
    "Register the course's own implementation for a catcher."
    def register(catcher):
        OURS[catcher.__name__] = ours
        return catcher
    return register


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fill(layer, seed=0):
    "Random values in both adapter matrices; B starts at zero, where every scale looks right."
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B):
            p.copy_(torch.randn(p.shape, generator=generator(seed)))
    return layer


# --- adapters --------------------------------------------------------------------------------------------------------


@caught_on(LoRALinear)
def lora_scale(make):
    "`make(base, r, alpha)` adds alpha / r times B A x."
    x = torch.randn(5, 8, generator=generator(1))
    for r, alpha in ((2, 8), (4, 8), (8, 4)):  # never alpha == r
        base = nn.Linear(8, 8)
        layer = fill(make(base, r, alpha))
        want = base(x) + alpha / r * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
        assert torch.allclose(layer(x), want, rtol=1e-4, atol=1e-4), f"the update is not alpha / r times B A x at r = {r}, alpha = {alpha}"


@caught_on(LoRALinear)
def lora_any_shape(make):
    "`make(base, r, alpha)` adapts layers that are wider or narrower than their input."
    for n_in, n_out in ((8, 8), (12, 5), (5, 12)):
        base, x = nn.Linear(n_in, n_out), torch.randn(3, n_in)
        try:
            layer = fill(make(base, 2, 4))
            out = layer(x)
        except (RuntimeError, ValueError) as e:
            raise AssertionError(f"a layer of {n_in} -> {n_out} cannot be adapted: {e}") from e
        assert torch.allclose(out, base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T, atol=1e-4), f"wrong update at {n_in} -> {n_out}"


@caught_on(LoRALinear)
def lora_mode_changes_nothing(make):
    "Switching an adapted layer between train and eval changes neither what it computes nor what it saves."
    layer = fill(make(nn.Linear(7, 4), 2, 6))
    net, x = nn.Sequential(layer), torch.randn(3, 7)
    weight, out = {k: v.clone() for k, v in net.state_dict().items()}, net(x).detach()
    for switch in (net.eval, layer.eval, net.train, layer.train, layer.eval, layer.eval, net.eval):
        switch()
        assert torch.allclose(net(x), out, atol=1e-5), f"the output changed with {switch.__self__.__class__.__name__}.{switch.__name__}()"
        assert all(torch.equal(v, weight[k]) for k, v in net.state_dict().items()), "the saved weights changed with the mode"


# --- losses ----------------------------------------------------------------------------------------------------------


def _dropped_out_pairs():
    "A policy in training mode with dropout, and pairs of answers."
    rows = [encode_pair(TOKENIZER, {"prompt": "Ada Moss lives in ", "chosen": a, "rejected": b}) for a, b in (("Lisbon.", "Oslo and likes it."), ("Rome.", "Bonn."))]
    return tiny(attention_dropout=0.3).train(), PreferenceBatches(rows, 2)


@caught_on(reference_logps)
def dpo_reference_is_constant(reference):
    "`reference(model, batches)` gives numbers without a graph and without dropout, and leaves the model in its mode."
    model, batches = _dropped_out_pairs()
    first, second = (torch.as_tensor(reference(model, batches)) for _ in range(2))
    assert not first.requires_grad, "the reference carries a gradient: the loss would train it"
    assert torch.equal(first, second), "the reference is not the same twice: dropout is on"
    assert model.training, "the policy was left in eval mode"


@caught_on(ppo_clip_loss)
def ppo_raises_what_was_good(loss):
    "A step down `loss(logps, old_logps, advantages, mask, clip_eps)` makes good actions likelier and bad ones less likely."
    logps = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    advantages, mask = torch.tensor([[2.0, -1.0, 5.0]]), torch.tensor([[1, 1, 0]])
    loss(logps, logps.detach().clone(), advantages, mask, 0.2).backward()
    good, bad, padding = (-logps.grad[0]).tolist()
    assert good > 0 > bad, f"a step down the loss moves log-probabilities by {good:+.2f} where the advantage is 2 and {bad:+.2f} where it is -1"
    assert padding == 0, "padding has a gradient"


@caught_on(whiten)
def whitening_ignores_padding(fn):
    "`fn(x, mask)`: what is masked has no influence on the rest."
    x, mask = torch.randn(3, 6, generator=generator()), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).float()
    there = mask.bool()
    a, b = fn(x, mask), fn(torch.where(there, x, torch.full_like(x, 50.0)), mask)
    assert torch.allclose(a[there], b[there], atol=1e-5), "padding moves the mean or the variance of advantages"
    assert abs(float(a[there].mean())) < 1e-5, "the mean over real tokens is not zero"


@caught_on(token_logps)
def next_token_is_the_target(fn):
    "`fn(logits, labels)`: position t is judged by token t + 1, in each row on its own."
    labels = torch.tensor([[4, 1, 3, 2, 0], [2, 2, 1, 0, 3]])
    logits = 50.0 * F.one_hot(labels.roll(-1, 1), 6).float()  # sure of the very next token
    logps = fn(logits, labels)
    assert logps.shape == (2, 4) and float(logps.min()) > -1e-3, f"a model that is right about every next token has log-probability {float(logps.min()):.0f}"


# --- batches ---------------------------------------------------------------------------------------------------------


def padded(examples, pad_id, side="right"):
    return PaddedBatches(examples, len(examples), pad_id, shuffle=False, side=side).collate(list(range(len(examples))))


@caught_on(padded)
def end_token_is_learned(collate):
    "`collate(examples, pad_id)` keeps the end token as a target where it doubles as padding, and no padding."
    eos = 1
    examples = [{"input_ids": [5, 6, 7, eos], "labels": [IGNORE, 6, 7, eos]}, {"input_ids": [8, eos], "labels": [IGNORE, eos]}]
    labels = collate(examples, eos)["labels"]
    assert (labels == eos).sum(1).tolist() == [1, 1], f"the rows' end tokens among the targets: {(labels == eos).sum(1).tolist()} instead of one each"


@caught_on(lambda examples: padded(examples, 0, "left"))
def left_padding_changes_nothing(collate):
    "`collate(examples)`: a row that is padded on the left scores as it does alone, with absolute positions."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)).eval()
    rows = [[int(t) for t in torch.randint(2, 40, (n,), generator=generator(n))] for n in (9, 4, 6)]
    examples = [{"input_ids": ids, "labels": ids} for ids in rows]

    def scores(batch):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        return token_logps(net(**inputs, use_cache=False).logits, batch["labels"]).sum(1)

    with torch.no_grad():
        together, alone = scores(collate(examples)), torch.cat([scores(collate([e])) for e in examples])
    assert torch.allclose(together, alone, atol=1e-3), f"rows score {together.tolist()} together and {alone.tolist()} alone"


@caught_on(lambda examples: PackedBatches(examples, 1, 64, shuffle=False).collate([list(range(len(examples)))]))
def packing_keeps_documents_apart(collate):
    "`collate(examples)` packs documents into one row whose loss is the sum of theirs."
    model = tiny().eval()
    rows = [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in ROWS[:3]]  # texts: a first token must not be learned from the row before
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # attention that looks somewhere
        apart, together = sum(lm_loss(model, padded([e], 0)) for e in rows), lm_loss(model, collate(rows))
    assert torch.allclose(apart, together, rtol=1e-4), f"three documents cost {float(apart):.3f} nats alone and {float(together):.3f} packed"


def _plans(epoch, n=40):
    return PaddedBatches([{"input_ids": [1, 2], "labels": [1, 2]}] * n, 4).plan(epoch)


@caught_on(_plans)
def epochs_differ(plan):
    "`plan(epoch)` is a new order in each epoch, the same one each time it is asked, and every row once."
    orders = [[n for batch in plan(epoch) for n in batch] for epoch in (0, 1, 0)]
    assert all(sorted(order) == list(range(len(order))) for order in orders), "an epoch does not hold each row once"
    assert orders[0] == orders[2], "an epoch is not the same twice: a resumed run would see other data"
    assert orders[0] != orders[1], "the second epoch has the order of the first"


def bos_tokenizer():
    "A tokenizer that adds a start token by itself, with a chat template that writes one too, as Llama 3 has it."
    tok = copy.deepcopy(TOKENIZER)
    tok.add_special_tokens({"bos_token": "<|bos|>"})
    tok._tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tok.bos_token_id)])
    tok.chat_template = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    return tok


@caught_on(lambda tokenizer, messages: encode_messages(tokenizer, messages)["input_ids"])
def one_start_token(encode):
    "`encode(tokenizer, messages)` begins with exactly one start token."
    tok = bos_tokenizer()
    assert tok("Ada").input_ids.count(tok.bos_token_id) == 1  # the trap is set
    ids = encode(tok, [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Lisbon."}])
    n = list(ids).count(tok.bos_token_id)
    assert n == 1 and ids[0] == tok.bos_token_id, f"{n} start tokens"


# --- the step --------------------------------------------------------------------------------------------------------


class Windows:
    "A layout of given micro-batches."

    def __init__(self, micro_batches):
        self.micro_batches = micro_batches

    def plan(self, epoch):
        return list(range(len(self.micro_batches)))

    def collate(self, item):
        return self.micro_batches[item]


def accumulate_in_fit(model, micro_batches):
    "The gradients of one step of `fit`, as the optimizer gets them."
    seen = []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    try:
        fit(model, Windows(micro_batches), config=replace(CONFIG, max_steps=1, grad_accum_steps=len(micro_batches), max_grad_norm=None, learning_rate=0.0))
    finally:
        handle.remove()
    for p, grad in zip(model.parameters(), seen, strict=True):
        p.grad = grad


@caught_on(accumulate_in_fit)
def accumulation_is_the_big_batch(accumulate):
    "`accumulate(model, micro_batches)` leaves the gradient of the mean over all targets, whoever holds them."
    layout = PaddedBatches(ROWS, 2, shuffle=False)
    parts = [layout.collate(rows) for rows in ([0], [3, 7, 5], [1, 2])]  # 1, 3 and 2 rows, of unequal lengths
    assert len({p["n_targets"] / len(p["labels"]) for p in parts}) > 1
    big = layout.collate([0, 3, 7, 5, 1, 2])
    want, got = tiny(), tiny()
    (lm_loss(want, big) / big["n_targets"]).backward()
    accumulate(got, parts)
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (want, got))
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-6), f"the gradient is off by {float((a - b).norm() / a.norm()):.0%}"


def adamw_of_core(params, lr, betas, eps):
    holder = nn.Module()
    holder.params = nn.ParameterList(params)
    return core.adamw(holder, TrainConfig(learning_rate=lr, betas=betas, eps=eps, weight_decay=0.0))


@caught_on(adamw_of_core)
def epsilon_is_outside_the_root(make):
    "`make(params, lr, betas, eps)`: the first step is lr g / (|g| + eps), of which the root of v + eps would make another number."
    for g, eps in ((1e-3, 1e-3), (1e-6, 1e-8), (2.0, 1e-8)):
        p = nn.Parameter(torch.zeros(3, 2))
        optimizer = make([p], 0.1, (0.9, 0.99), eps)
        p.grad = torch.full_like(p, g)
        optimizer.step()
        want = -0.1 * g / (g + eps)
        assert torch.allclose(p.detach(), torch.full_like(p, want), rtol=1e-3), f"the first step is {p[0, 0].item():.3g} instead of {want:.3g} at g = {g:g}, eps = {eps:g}"


def scaled_step(model, window, optimizer, scaler, max_norm):
    stability.train_with_rollback(model, [window], optimizer, lambda step: 0.1, max_norm=max_norm, scaler=scaler)


@caught_on(scaled_step)
def clipping_sees_unscaled_gradients(step):
    "`step(model, window, optimizer, scaler, max_norm)`: a loss scale changes nothing about a step, clipped or not."
    window = [PaddedBatches(ROWS, 3, shuffle=False).collate([0, 1, 2])]
    for max_norm in (0.05, 1e4):
        ends = []
        for scale in (1.0, 2.0**14):
            model = tiny()
            step(model, window, torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=scale), max_norm)
            ends.append(flat(model) - flat(tiny()))
        moved = [float(e.norm()) for e in ends]
        assert torch.allclose(ends[0], ends[1], rtol=1e-3, atol=1e-6), f"with max_norm {max_norm:g} the step has length {moved[0]:.2g}, and {moved[1]:.2g} under a loss scale"


def rates_of_core(batches, config, world):
    total = core.total_steps(batches, config, world)
    return [core.learning_rate_at(step, total, config) for step in range(total)]


@caught_on(rates_of_core)
def schedule_does_not_count_processes(rates):
    "`rates(batches, config, world)`: the rate of each optimizer step; warm-up and decay take the run's steps, however many processes there are."
    layout, config = PaddedBatches([{"input_ids": [1, 2], "labels": [1, 2]}] * 160, 1), TrainConfig(learning_rate=1.0, warmup_steps=10, schedule="linear")
    for world in (1, 2, 4):
        got = rates(layout, config, world)
        n = 160 // world
        assert len(got) == n and got.index(max(got)) == 9, f"with {world} processes the warm-up of 10 steps ends after {got.index(max(got)) + 1} of {len(got)}"
        assert math.isclose(got[n // 2 + 5], 0.5, abs_tol=0.05), f"with {world} processes the rate half-way down is {got[n // 2 + 5]:.2f}"


# --- checkpoints -----------------------------------------------------------------------------------------------------


def train_by_fit(folder, stop_after):
    "Six steps with dropout; stopped after some, it can be called again. Returns the weights, or None where it was stopped."
    model, calls = tiny(attention_dropout=0.3), [0]

    def loss(m, batch):
        calls[0] += 1
        if stop_after is not None and calls[0] > stop_after:
            raise KeyboardInterrupt
        return lm_loss(m, batch)

    try:
        fit(model, PaddedBatches(ROWS, 3), loss, replace(CONFIG, max_steps=6, save_every=1), run_dir=folder, resume=folder is not None)
    except KeyboardInterrupt:
        return None
    return flat(model)


@caught_on(train_by_fit)
def resume_is_bit_equal(train):
    "`train(folder, stop_after)`: stopped after three of six steps and called again, it ends where an undisturbed run ends."
    straight = train(None, None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        assert train(folder, 3) is None
        torch.manual_seed(12345)  # another process: its random state is another
        resumed = train(folder, None)
    assert torch.equal(straight, resumed), f"the resumed run ends {float((straight - resumed).abs().max()):.1e} away"


# --- four bits -------------------------------------------------------------------------------------------------------


@caught_on(nf4_levels)
def levels_are_usable(levels):
    "`levels()`: sixteen finite numbers in order, from -1 to 1, with a zero."
    x = levels()
    assert x.shape == (16,) and bool(torch.isfinite(x).all()), f"levels that are not finite: {x[~torch.isfinite(x)].tolist()}"
    assert bool((x.diff() > 0).all()) and float(x[0]) == -1 and float(x[-1]) == 1 and bool((x == 0).any()), "not in order from -1 to 1 with a zero"
