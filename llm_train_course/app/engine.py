"""Which engine a run trains under: the recipe, the short flags and the launcher together; refused early where it cannot.

The engines themselves are in `core`. Nothing here imports torch at import time.
"""
import os
from dataclasses import replace

from llm_train_course.app.runs import CONFIG, UserError

# written without `train.`, where a run on several processes is launched
SHORT = {"--engine": "--train.engine", "--zero": "--train.zero", "--offload": "--train.engine_offload", "--ds_config": "--train.ds_config"}
HELP = """  --engine, --zero, --offload, --ds_config
                        short for --train.engine, --train.zero, --train.engine_offload, --train.ds_config"""
ONLY_DDP = {"ppo": "its answers are written", "grpo": "its answers are written", "distill": "two models are compared"}
LAUNCHERS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def long_flags(
    argv: list[str],
) -> list[str]:
    "Short flags in full."
    names = [word.partition("=")[0] for word in argv]
    return [SHORT.get(name, name) + word[len(name):] for name, word in zip(names, argv)]


def restarted(
    out: str | None,  # the run folder that the command names
) -> bool:
    "Whether torchrun or Slurm started this command again after a process died: then the run in its folder goes on."
    again = any(os.environ.get(name, "0") not in ("", "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return bool(again and out and os.path.isfile(os.path.join(os.path.expanduser(out), CONFIG)))


def settle(
    recipe,
    command: str,
):                # the recipe, its engine named
    "The engine that recipe and launcher ask for together. What it cannot do is refused here, before anything is read."
    from llm_train_course.core import _check_deepspeed, deepspeed_config, named_engine

    try:
        train = named_engine(recipe.train)
        if train.engine == "deepspeed":
            deepspeed_config(train, recipe.micro_batch_size, int(os.environ.get("WORLD_SIZE", "1")), _weights(recipe))
    except ValueError as e:
        raise UserError(" ".join(f"{e}".split())) from e
    _refuse(train, recipe, command)
    if train.engine == "deepspeed":
        try:
            _check_deepspeed()
        except ValueError as e:
            raise UserError(f"train.{e}") from e
    for name in LAUNCHERS:  # the recipe says it now; libraries that read these would set an engine of their own up
        os.environ.pop(name, None)
    _join_again(train.cpu)
    return replace(recipe, train=train)


def _join_again(cpu):
    """The process group of a command that torchrun has started again.

    torch 2.13 keeps the store of the first attempt for the later ones, with the addresses of dead processes in it
    (`DynamicRendezvousHandler._shared_tcp_store_server`), and a group made from it may try to connect to them. So each attempt
    gets names of its own."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        gpu = torch.cuda.is_available() and not cpu
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        dist.init_process_group("nccl" if gpu else "gloo", store=dist.PrefixStore(f"attempt_{attempt}/", store),
                                rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))


def _weights(recipe):
    import torch
    return torch.bfloat16 if getattr(recipe, "dtype", "fp32") == "bf16" else torch.float32


def _refuse(train, recipe, command):
    from llm_train_course.core import weights_in_shards, zero_stage

    if train.engine == "ddp":
        return
    if command in ONLY_DDP:
        raise UserError(f"train.engine: llm-train {command} runs under ddp: {ONLY_DDP[command]} between the steps, which {train.engine} "
                        "would have to gather the weights for")
    if getattr(recipe, "monitor", False):
        raise UserError(f"monitor: engine {train.engine} holds weights and gradients where a monitor does not find them; use ddp")
    if getattr(recipe, "quant", None) and weights_in_shards(train):
        raise UserError(f"quant: 4-bit weights are not cut into shards, and {'fsdp' if train.engine == 'fsdp' else 'zero 3'} has nothing else to cut; "
                        "use ddp, or deepspeed with zero 1 or 2")
    low = getattr(recipe, "dtype", "fp32") == "bf16"
    if train.engine == "deepspeed" and low and train.precision != "bf16":
        raise UserError("dtype: bf16 weights are multiplied in bf16 under deepspeed: set train.precision bf16, or dtype fp32")
    if low and train.engine == "fsdp" and not getattr(recipe, "lora", None):
        raise UserError("dtype: bf16 weights need a float32 copy to be trained, which fsdp does not keep: set dtype fp32 with train.precision bf16")
    if low and zero_stage(train) == 0:
        raise UserError("dtype: bf16 weights need a float32 copy to be trained, which zero 1, 2 and 3 keep; zero 0 does not")


def described(
    train,             # with its engine named
) -> str | None:       # None: there is nothing to say
    "The engine, in words."
    from llm_train_course.core import zero_stage

    world, stage = int(os.environ.get("WORLD_SIZE", "1")), zero_stage(train)
    if world == 1 and train.engine == "ddp":
        return None
    name = {"ddp": "DDP", "fsdp": "FSDP2", "deepspeed": f"DeepSpeed ZeRO-{stage}"}[train.engine]
    place = ", shards in the host's memory" if train.engine_offload == "cpu" else ""
    return f"{name}, {world} process{'es' if world > 1 else ''}{place}"
