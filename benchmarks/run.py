"""Side-by-side timings against the libraries the course explains. `make bench` runs all, and writes benchmarks/results/.

Both sides train the same model on the same rows for the same number of rows, in one process, in turns (A B A B ...), after
a warm-up of each. Ratios are reported, with the smallest and the largest of the repetitions; seconds are not kept.
"""
import argparse
import copy
import gc
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def alternate(ours, theirs, repeat: int) -> dict:
    "Ratio theirs / ours of seconds, over `repeat` interleaved pairs after one warm-up of each."
    ours(), theirs()
    pairs = []
    for _ in range(repeat):
        seconds = []
        for side in (ours, theirs):
            gc.collect()
            start = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - start)
        pairs.append(seconds[1] / seconds[0])
    return {"speedup_median": round(statistics.median(pairs), 2), "speedup_min": round(min(pairs), 2),
            "speedup_max": round(max(pairs), 2), "pairs": repeat}


def trl_trainer(model, tokenizer, rows, batch_size, folder, **config):
    "TRL's SFTTrainer on conversations, with what it needs to run in float32 on a CPU."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=folder, per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=1e-3,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=10**6,
        disable_tqdm=True, **{"max_length": 512, **config})
    return SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def sft_tiny(repeat, folder):
    "A 0.46 M-parameter Llama, one epoch over the small world's instruction rows."
    from llm_train_course.core import PackedBatches, PaddedBatches, TrainConfig, encode_text, tiny_llama
    from llm_train_course.stages import World

    world = World(seed=0)
    rows = [{"text": world.tokenizer.apply_chat_template(r["messages"], tokenize=False)} for r in world.sft_examples()]
    start = tiny_llama(len(world.tokenizer))
    examples = [encode_text(world.tokenizer, r["text"].removesuffix(world.tokenizer.eos_token)) for r in rows]
    config = TrainConfig(learning_rate=1e-3, progress=False, cpu=True, log_every=10**6)
    layouts = {"padded": PaddedBatches(examples, 16), "packed": PackedBatches(examples, 4, 128)}
    return {f"sft tiny, {name}": _fit_against_trl(start, layout, config, world.tokenizer, rows, repeat, folder, extra)
            for (name, layout), extra in zip(layouts.items(), ({}, {"packing": True, "max_length": 128}))}


def _fit_against_trl(start, layout, config, tokenizer, rows, repeat, folder, extra):
    from llm_train_course.core import fit

    # the trainer prepares its data when it is made: that is not timed
    runs = [trl_trainer(copy.deepcopy(start), tokenizer, rows, layout.micro_batch_size, folder, **extra).train
            for _ in range(repeat + 1)]
    return alternate(lambda: fit(copy.deepcopy(start), layout, config=config), lambda: runs.pop()(), repeat)


def loss_large_vocabulary(repeat, folder):
    "Loss and gradients of 1,024 targets, hidden size 576, vocabulary 49,152 (SmolLM2's output layer)."
    from llm_train_course.core import linear_logps

    # small weights, as in a model: with large ones, denormal probabilities slow both sides twentyfold
    hidden, weight = torch.randn(1024, 576, requires_grad=True), (0.05 * torch.randn(49_152, 576)).requires_grad_()
    targets = torch.randint(0, 49_152, (1024,))

    def plain(w):
        return lambda: torch.nn.functional.cross_entropy(hidden @ w.T, targets, reduction="sum").backward()

    def ours(w, uniform):
        return lambda: (-linear_logps(hidden, w, targets, uniform=uniform)).sum().backward()

    frozen = weight.detach()
    # theirs holds a (1,024, 49,152) table of logits and its gradient, ours a chunk: memory is the point, speed must not suffer
    return {"loss, 49k vocabulary, trained matrix, summed": alternate(ours(weight, True), plain(weight), repeat),
            "loss, 49k vocabulary, trained matrix, per row": alternate(ours(weight, False), plain(weight), repeat),
            "loss, 49k vocabulary, frozen matrix": alternate(ours(frozen, False), plain(frozen), repeat)}


def benches() -> dict:
    "All of them by name; those of the adapters have files of their own, which import this one."
    import lora
    import qlora

    return {f.__name__: f for f in (loss_large_vocabulary, sft_tiny)} | lora.BENCHES | qlora.BENCHES


def main():
    known = benches()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(known), help=f"of {', '.join(known)}")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    import tempfile
    import warnings
    from importlib.metadata import version

    warnings.filterwarnings("ignore", module="transformers|peft")
    RESULTS.mkdir(exist_ok=True)
    for name in args.names:
        with tempfile.TemporaryDirectory() as folder:
            rows = known[name](args.repeat, folder)
        report = {"what": known[name].__doc__, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
                  "machine": platform.machine(), "torch": torch.__version__,
                  **{name: version(name) for name in ("transformers", "trl", "peft", "bitsandbytes")}, "results": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        for what, row in rows.items():
            print(f"{what:50s} ours is {row['speedup_median']:.2f} times as fast ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})")


if __name__ == "__main__":
    main()
