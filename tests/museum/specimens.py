"""The museum of bugs: each one shipped somewhere, and is rebuilt here in a few lines.

A specimen has a name, where it was found, what it did to those who trained with it, and the catcher that refuses it. The first
nine stood in well-known courses and in examples that were copied from them; the others come from the public trackers of
trainers that people use. What is rebuilt is the mistake, not the code it was made in.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from catchers import padded
from helpers import ROWS, flat
from helpers import model as tiny
from torch import nn

from llm_train_course import core
from llm_train_course.core import IGNORE, PaddedBatches, lm_loss
from llm_train_course.dpo import answer_logps


@dataclass(frozen=True)
class Specimen:
    "A bug in a jar."
    name: str
    catcher: str       # its name in catchers.py
    found_in: str      # "courses", or owner/repository#number
    harm: str          # what it did
    refused_for: str   # part of the message with which the catcher refuses it
    implementation: object


MUSEUM: list[Specimen] = []


def specimen(catcher, found_in, harm, refused_for):
    def shelve(implementation):
        name = implementation.__name__
        MUSEUM.append(Specimen(name, catcher, found_in, harm, refused_for, implementation))
        return implementation
    return shelve


class Adapter(nn.Module):
    "A correct one, for the specimens to be wrong in one way each."

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, base.in_features)), nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


# --- from courses ----------------------------------------------------------------------------------------------------


@specimen("lora_scale", "courses", "at r = 8 and alpha = 16 the update is eight times too strong, and a change of rank changes the learning rate",
          "not alpha / r times B A x at r = 2, alpha = 8")
class LoraScaledByAlpha(Adapter):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.scaling = alpha


@specimen("lora_any_shape", "courses", "works on attention of a small model, where all matrices are square, and fails on every MLP",
          "a layer of 12 -> 5 cannot be adapted")
class LoraOnSquareLayersOnly(Adapter):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, base.out_features)), nn.Parameter(torch.zeros(base.in_features, r))


@specimen("dpo_reference_is_constant", "courses", "the reference is trained away together with the policy", "the reference carries a gradient")
def dpo_reference_without_no_grad(model, batches):
    model.eval()
    out = answer_logps(model, batches.collate(range(len(batches.examples))))[0]
    model.train()
    return out


@specimen("ppo_raises_what_was_good", "courses", "the policy unlearns whatever earned a reward", "a step down the loss moves log-probabilities by -")
def ppo_with_the_wrong_sign(logps, old_logps, advantages, mask, clip_eps):
    ratio = (logps - old_logps).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    return (surrogate * mask).sum() / mask.sum()  # to be maximised, and handed to a minimiser


@specimen("accumulation_is_the_big_batch", "courses", "short micro-batches weigh as much as long ones; the same in huggingface/transformers#34191 and most trainers until late 2024",
          "the gradient is off by")
def accumulation_divided_per_micro_batch(model, micro_batches):
    for batch in micro_batches:
        (lm_loss(model, batch) / batch["n_targets"] / len(micro_batches)).backward()


def own_loop(folder, stop_after, save, load):
    "Six steps with dropout around a checkpoint of one's own."
    torch.manual_seed(0)
    model, layout = tiny(attention_dropout=0.3).train(), PaddedBatches(ROWS, 3)
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=3e-3), 0
    path = folder and Path(folder) / "checkpoint.pt"
    if path and path.exists():
        first = load(torch.load(path, weights_only=False), model, optimizer)
    plan = layout.plan(0) + layout.plan(1)
    for step in range(first, 6):
        if step == stop_after:
            return None
        batch = layout.collate(plan[step])
        (lm_loss(model, batch) / batch["n_targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if path:
            path.parent.mkdir(exist_ok=True)
            torch.save({**save(model, optimizer), "step": step + 1}, path)
    return flat(model)


@specimen("resume_is_bit_equal", "courses", "every restart rounds the weights to eight bits of precision and loses the updates that are smaller",
          "the resumed run ends")
def resume_through_half_precision(folder, stop_after):
    def load(state, model, optimizer):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        return state["step"]
    save = lambda model, optimizer: {"model": {k: v.bfloat16() for k, v in model.state_dict().items()}, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    return own_loop(folder, stop_after, save, load)


@specimen("resume_is_bit_equal", "courses", "dropout and sampling after a restart are not those of the run that was interrupted: it cannot be repeated",
          "the resumed run ends")
def resume_without_random_state(folder, stop_after):
    def load(state, model, optimizer):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    return own_loop(folder, stop_after, lambda model, optimizer: {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, load)


class OwnAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    def root(self, v, eps):
        return v.sqrt() + eps

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), eps = group["betas"], group["eps"]
            for p in group["params"]:
                s = self.state[p]
                s["t"] = s.get("t", 0) + 1
                s["m"] = b1 * s.get("m", 0) + (1 - b1) * p.grad
                s["v"] = b2 * s.get("v", 0) + (1 - b2) * p.grad**2
                p -= group["lr"] * (s["m"] / (1 - b1 ** s["t"])) / self.root(s["v"] / (1 - b2 ** s["t"]), eps)


@specimen("epsilon_is_outside_the_root", "courses", "with epsilon 1e-8 inside, gradients below 1e-4 are damped as if they were noise", "the first step is")
class AdamWithEpsilonInsideTheRoot(OwnAdam):
    def root(self, v, eps):
        return (v + eps).sqrt()


def nf4_from(lowest):
    "Eight quantiles up to zero and nine from it, the outermost at this probability, over the largest that is finite."
    half = lambda n: torch.special.ndtri(torch.linspace(lowest, 0.5, n, dtype=torch.float64))
    q = torch.cat([half(8), -half(9).flip(0)[1:]])
    return (q / q[q.isfinite()].abs().max()).float()


@specimen("levels_are_usable", "courses", "Eq. 4 of arXiv:2305.14314 taken by its letter: the outermost quantiles are those of probability 0 and 1",
          "levels that are not finite: [-inf, inf]")
def nf4_with_infinite_ends():
    return nf4_from(0.0)


# --- from trackers ---------------------------------------------------------------------------------------------------


@specimen("end_token_is_learned", "huggingface/trl#976", "where padding and end token are one, masking the padding masks the end: the model never stops", "end tokens among the targets")
def padding_masked_by_its_id(examples, pad_id):
    batch = padded(examples, pad_id)
    return {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] == pad_id, IGNORE)}


@specimen("left_padding_changes_nothing", "OpenRLHF/OpenRLHF#217", "log-probabilities of a padded row are those of other positions than the ones it was sampled at: PPO's ratio is not 1 where it must be",
          "rows score")
def positions_counted_from_the_padding(examples):
    return {k: v for k, v in padded(examples, 0, "left").items() if k != "position_ids"}


@specimen("packing_keeps_documents_apart", "huggingface/trl#1230", "a packed document reads its neighbours, and starts at a position where none starts in use", "three documents cost")
def packing_with_one_long_context(examples):
    ids, labels = (sum((list(e[k]) for e in examples), []) for k in ("input_ids", "labels"))
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


@specimen("one_start_token", "OpenRLHF/OpenRLHF#393", "a rendered template is tokenised as text, and gets a second start token, which the model meets nowhere else", "2 start tokens")
def template_rendered_then_tokenised(tokenizer, messages):
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids


@specimen("clipping_sees_unscaled_gradients", "Lightning-AI/pytorch-lightning#9330", "gradients are clipped while they are 16,384 times too large, then unscaled: training all but stands still",
          "under a loss scale")
def clipping_before_unscaling(model, window, optimizer, scaler, max_norm):
    n = sum(batch["n_targets"] for batch in window)
    scaler.scale(sum(lm_loss(model, batch) for batch in window) / n).backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()


@specimen("next_token_is_the_target", "huggingface/transformers#47394", "labels are shifted by the model and once more by the loss: position t learns token t + 2, and rows leak into each other",
          "a model that is right about every next token has log-probability")
def labels_shifted_twice(logits, labels):
    logits, labels = logits[:, :-1], labels[:, 1:]
    return core.token_logps(F.pad(logits, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=IGNORE))


@specimen("whitening_ignores_padding", "NovaSky-AI/SkyRL#1305", "advantages of real tokens depend on how long the longest answer of the batch is", "padding moves the mean")
def whitening_with_the_mean_over_padding(x, mask):
    mean = x.mean()
    return (x - mean) * (((x - mean) ** 2 * mask).sum() / mask.sum() + 1e-8).rsqrt() * mask


@specimen("epochs_differ", "huggingface/transformers#4398", "the sampler is never told the epoch: every epoch has the order of the first", "the second epoch has the order of the first")
def sampler_without_set_epoch(epoch, n=40, seed=0):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[s:s + 4] for s in range(0, n, 4)]


@specimen("lora_mode_changes_nothing", "microsoft/LoRA#61", "merging hangs on eval(), which a parent's eval() does not call: whether a saved weight holds the update, once, twice or not, depends on who called what",
          "the output changed with LoraMergedByEval.eval()")
class LoraMergedByEval(Adapter):
    def eval(self):
        with torch.no_grad():
            self.base.weight += self.scaling * self.lora_B @ self.lora_A
        return super().eval()


@specimen("schedule_does_not_count_processes", "huggingface/transformers#24088", "each process steps the shared schedule: with four of them warm-up and decay are over after a quarter of the run",
          "with 2 processes the warm-up of 10 steps ends after 5")
def schedule_stepped_by_every_process(batches, config, world, times=None):
    total, times = core.total_steps(batches, config, world), times or world  # times the schedule is stepped in an optimizer step
    return [core.learning_rate_at(min(times * (step + 1) - 1, total), total, config) for step in range(total)]


# --- the same without the mistake, so that each specimen is known to be wrong in one thing ---------------------------------


def _ppo(logps, old_logps, advantages, mask, clip_eps):
    return -ppo_with_the_wrong_sign(logps, old_logps, advantages, mask, clip_eps)


def _reference(model, batches):
    with torch.no_grad():
        return dpo_reference_without_no_grad(model, batches)


def _accumulate(model, micro_batches):
    n = sum(batch["n_targets"] for batch in micro_batches)
    for batch in micro_batches:
        (lm_loss(model, batch) / n).backward()


def _resume(folder, stop_after):
    def load(state, model, optimizer):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        return state["step"]
    save = lambda model, optimizer: {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    return own_loop(folder, stop_after, save, load)


def _step(model, window, optimizer, scaler, max_norm):
    n = sum(batch["n_targets"] for batch in window)
    scaler.scale(sum(lm_loss(model, batch) for batch in window) / n).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)


def _whiten(x, mask):
    mean = (x * mask).sum() / mask.sum()
    return (x - mean) * (((x - mean) ** 2 * mask).sum() / mask.sum() + 1e-8).rsqrt() * mask


def _packed(examples):
    "Positions that start again keep documents apart; the first token of each has nothing to be learned from."
    batch = packing_with_one_long_context(examples)
    lengths = [len(e["input_ids"]) for e in examples]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {**batch, "position_ids": positions, "labels": batch["labels"].masked_fill(positions == 0, IGNORE)}


CONTROLS = {
    "lora_scale": Adapter, "lora_any_shape": Adapter, "lora_mode_changes_nothing": Adapter, "dpo_reference_is_constant": _reference,
    "ppo_raises_what_was_good": _ppo, "accumulation_is_the_big_batch": _accumulate, "resume_is_bit_equal": _resume,
    "epsilon_is_outside_the_root": OwnAdam, "clipping_sees_unscaled_gradients": _step, "whitening_ignores_padding": _whiten,
    "left_padding_changes_nothing": lambda examples: padded(examples, 0, "left"), "end_token_is_learned": padded,
    "one_start_token": lambda tokenizer, messages: tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids,
    "packing_keeps_documents_apart": _packed, "next_token_is_the_target": lambda logits, labels: core.token_logps(logits, labels),
    "epochs_differ": lambda epoch: sampler_without_set_epoch(epoch, seed=epoch), "schedule_does_not_count_processes": lambda *a: schedule_stepped_by_every_process(*a, times=1),
    "levels_are_usable": lambda: nf4_from(1 - 0.9677083),
}
