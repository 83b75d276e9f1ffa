"A tiny model, its tokenizer and a few rows of unequal lengths; processes that are killed, and two that train together."
import os
import random
import signal
import socket
import traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp

from llm_train_course import core
from llm_train_course.core import TrainConfig, encode_prompt_completion, tiny_llama, train_tokenizer

NAMES = ["Ada Moss", "Ben Hale", "Cleo Park", "Dan Ruiz", "Eva Lund", "Finn Orr", "Gia Voss", "Hal Reed", "Ida Bell"]
CITIES = ["Lisbon", "Oslo", "Quito", "Hanoi", "Turin", "Accra", "Perth", "Lima", "Kyoto"]
SENTENCES = [f"{n} lives in {c}{' and likes it' * (k % 4)}." for k, (n, c) in enumerate(zip(NAMES, CITIES))]
TOKENIZER = train_tokenizer(SENTENCES, 320)
ROWS = [encode_prompt_completion(TOKENIZER, s[:9], s[9:]) for s in SENTENCES]
CONFIG = TrainConfig(learning_rate=3e-3, max_steps=9, log_every=1, progress=False, cpu=True)


def model(seed=0, **kw):
    return tiny_llama(len(TOKENIZER), hidden_size=32, seed=seed, **kw)


def flat(m):
    return torch.cat([p.detach().float().flatten() for p in m.parameters()])


def files_of(folder):
    "All files below a folder with their contents."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and "__pycache__" not in p.parts}


def killed_until_done(run, moments, least, seed=0):
    """Run in forked children, each killed (-9, unasked) after a random number of losses, files written, flushes and renames,
    until one lives. `run(counted)` wraps its loss in `counted`. Returns after at least `least` kills."""
    rng, kills, exit_code = random.Random(seed), 0, None
    while exit_code != 0:
        moment = rng.randint(*moments)
        pid = os.fork()
        if pid == 0:  # the child never comes back into pytest
            try:
                run(_killer(moment))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert exit_code in (0, -signal.SIGKILL)
        kills += exit_code != 0
        assert kills < 200
    assert kills >= least


def _killer(moment):
    left = [moment]

    def counted(fn):
        def call(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args)
        return call

    for owner, name in ((core, "_write_tensors"), (core, "_sync"), (core.os, "rename")):
        setattr(owner, name, counted(getattr(owner, name)))
    return counted


def on_two_ranks(worker, folder, start_method="spawn"):
    "`worker(rank, folder)` in two processes on gloo."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_on_rank, (2, port, worker, str(folder)), nprocs=2, start_method=start_method)


def _on_rank(rank, world, port, worker, folder):
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one may be forked from
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    worker(rank, folder)
    torch.distributed.destroy_process_group()
