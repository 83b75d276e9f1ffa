"""`llm-train`: one command for every job. `llm-train COMMAND --help` says more.

This module imports neither torch nor transformers: `llm-train --help` answers at once. A new training command is a
line in `COMMANDS` and a function in `app/train.py`.
"""
import difflib
import logging
import os
import re
import sys
import warnings

from llm_train_course import __version__
from llm_train_course.app.data import DataError
from llm_train_course.app.runs import UserError

COMMANDS = {
    "pretrain": "train a small model from scratch on texts, or on the small world",
    "sft": "fine-tune a model on texts, conversations, or prompts with completions; in full or with LoRA",
    "lora": "the same: low-rank adapters on a frozen base",
    "qlora": "the same: low-rank adapters on a frozen base in 4 bits",
    "full": "the same: all parameters",
    "rm": "fit a reward model to preference pairs",
    "ppo": "reinforcement learning against a reward model, with a value and a KL penalty",
    "grpo": "reinforcement learning against reward functions of yours, several answers to a prompt compared",
    "dpo": "learn from preference pairs without a reward model (DPO, IPO, KTO, ORPO, SimPO, DPO-Positive)",
    "distill": "teach a smaller model by a larger one: its probabilities, its texts, or on the student's own",
    "merge": "add an adapter to its base: a model folder that transformers loads alone",
    "eval": "loss and perplexity of a model on held-out data; the measures of the small world",
    "chat": "talk to a trained model, or answer the lines of stdin",
    "demo": "the main job: the small world through its stages, then a real model (what `make run` does)",
}
_TRAINING = ("pretrain", "sft", "lora", "qlora", "full", "rm", "ppo", "grpo", "dpo", "distill")
_BAD = 2  # exit code for what the user can mend


def usage() -> str:
    "What `llm-train` alone prints."
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
    return f"""usage: llm-train COMMAND [--config recipe.yaml] [--field value ...]

{commands}

  llm-train demo
  llm-train lora --config recipes/smollm2-lora.yaml --train.learning_rate 1e-4
  llm-train qlora --model smollm2 --data my.jsonl --lora.r 16
  llm-train dpo --model runs/lora-smollm2-1 --data pairs.jsonl --lora.r 8
  llm-train grpo --model smollm2 --data prompts.jsonl --reward my_rewards.py:short --lora.r 8
  llm-train lora --resume runs/lora-smollm2-1
  llm-train eval runs/lora-smollm2-1 --data interview:heldout
  llm-train chat runs/lora-smollm2-1
  llm-train merge runs/lora-smollm2-1
  torchrun --nproc_per_node 2 -m llm_train_course.app.cli sft --config recipe.yaml --engine deepspeed --zero 3

Data: JSONL or Parquet with {{"text"}}, {{"messages"}} or {{"prompt", "completion"}}, a .txt file, a hub name[:split],
`interview`, `interview:heldout` (the course's own), or `world`. For rm and dpo: {{"prompt", "chosen", "rejected"}}, or
`claims`, `claims:heldout` (the course's own; `claims:zh` in Chinese). For ppo and grpo: {{"prompt"}} with columns for reward
functions, or {{"messages"}} up to the last user turn. Every bad row is named before anything is written.

options: --help (after a command: its fields), --version, --debug (show tracebacks)
"""


# ---------------------------------------------------------------------------------------------------------------------
# jsonargparse, with its messages on one line
# ---------------------------------------------------------------------------------------------------------------------
_TYPES = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'str'>": "text",
          "<class 'bool'>": "true or false", "<class 'NoneType'>": "null", "<class 'dict'>": "fields"}


def tidy(
    message: str,               # jsonargparse's, of many lines
    fields: tuple[str, ...],    # all there are
) -> str:
    "One line that names field, value and what is right."
    text = message.strip()
    option = re.search(r"Group '([^']+)' does not accept option '([^']+)'", text)
    path = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    inner = re.search(r"[Oo]ption '([^']+)' is not accepted", text)
    stray = re.search(r"unrecognized arguments: (.*)", text)
    if option or inner or stray:
        name = (f"{option[1]}.{option[2]}" if option else ".".join(filter(None, (path, inner[1]))) if inner
                else stray[1].split()[0])
        if stray and not name.startswith("-"):
            return f"unexpected argument {name!r} (fields are written --field value)"
        name = name.lstrip("-").split("=")[0]
        near = difflib.get_close_matches(name, fields, 1, 0.6)
        return f"no field {name}" + (f" (did you mean {near[0]}?)" if near else "; --help lists the fields")
    missing = re.search(r"arguments are required: (.*)", text)
    if missing:
        names = [n.strip().lstrip("-") for n in missing[1].split(",")]
        return f"{' and '.join(names)} must be given (in the recipe, or as --{names[0]} VALUE)"
    if "Problems parsing config" in text:
        where = re.findall(r"line (\d+), column (\d+)", text)
        line, column = where[-1] if where else ("?", "?")
        return f"config: not YAML, near line {line}, column {column}"
    if "File does not exist" in text:
        return f"config: {text.split('File does not exist: ')[-1].strip(chr(39))}: no such file"
    if "Unexpected config" in text:
        return "config: a YAML mapping of fields is needed"
    if "Unable to load config" in text:
        name = re.search(r'Parser key "([^"]+)"', text)[1]
        value = re.search(r"Unable to load config '(.*?)'", text)
        return f"{name}: a group of fields is needed (--{name}.FIELD VALUE)" + (f", got {value[1]}" if value else "")
    if path:
        expected = []
        for kind in re.findall(r"Expected an? (<class '[^']+'>|typing\.\S*\[.*?\](?=\.| |$)|[^.\n]+)", text):
            kind = _TYPES.get(kind, re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind))
            if kind not in expected:
                expected.append(kind)
        value = re.search(r"Got value: (.*)", text) or re.search(r"Given value: (.*)", text)
        return (f"{path}: expected {' or '.join(expected) or 'another value'}"
                + (f", got {value[1].strip()}" if value else ""))
    first = text.split(" ", 1)[0]  # a check of TrainConfig names its field alone
    return ("train." if f"train.{first}" in fields and first not in fields else "") + " ".join(text.split())


def _comments(recipe, prefix=""):
    "Help texts: the comment behind each field, of nested dataclasses too."
    import dataclasses
    import inspect
    import typing

    found, types = {}, typing.get_type_hints(recipe)
    for kind in reversed([k for k in recipe.__mro__ if dataclasses.is_dataclass(k)]):  # what a recipe says of its own comes last
        for line in inspect.getsource(kind).splitlines():
            m = re.match(r"    (\w+): [^#]*#\s*(.+)", line)
            if m:
                found[prefix + m[1]] = m[2]
    for name, kind in types.items():
        for part in [kind, *typing.get_args(kind)]:
            if dataclasses.is_dataclass(part):
                found |= _comments(part, f"{prefix}{name}.")
    return found


def make_parser(command, recipe, positional=None):
    "A parser whose fields are those of a dataclass."
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"llm-train {command}", description=recipe.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe: a YAML file with these fields")
    if positional:
        parser.add_argument(positional, type=str, help="a run folder, a model folder, or a hub name")
    parser.add_class_arguments(recipe)
    parser.usage = f"llm-train {command} {positional.upper() + ' ' if positional else ''}[--config recipe.yaml] [--field value ...]"
    for group in parser._action_groups:
        if group.title and "<class" in group.title:
            name = re.search(r"'[\w.]*?(\w+)'", group.title)[1]
            group.title = "fields" if name == recipe.__name__ else f"fields of {name}"
    notes = _comments(recipe)
    for action in parser._actions:
        if action.dest in notes:
            action.help = notes[action.dest]
    return parser


def parse(
    command: str,
    recipe: type,
    argv: list[str],
    positional: str | None = None,
):                     # the recipe, or (positional, recipe)
    "Fields from the recipe file and the command line; anything unknown or ill-typed is refused by name."
    import argparse

    parser = make_parser(command, recipe, positional)
    fields = tuple(a.dest for a in parser._actions if a.dest not in ("help", "config"))
    fields += tuple(name for name in _comments(recipe) if name not in fields)
    try:
        values = parser.parse_args(argv)
        made = getattr(parser, "instantiate", None) or parser.instantiate_classes
        found = dict(vars(made(values)))
    except argparse.ArgumentError as e:
        raise UserError(tidy(str(e), fields)) from e
    except (ValueError, TypeError) as e:  # from a dataclass' own checks, which name the field
        raise UserError(tidy(str(e), fields)) from e
    found.pop("config", None)
    if positional is None:
        return recipe(**found)
    return found.pop(positional), recipe(**found)


def _check_yaml(argv):
    "A field written twice in a recipe: YAML readers keep the last one without a word."
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise UserError(f"config: line {key.start_mark.line + 1}: the field {key.value} is there twice")
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for name in [b for a, b in zip(argv, argv[1:]) if a == "--config"] + [a[9:] for a in argv if a.startswith("--config=")]:
        if os.path.isdir(name):
            raise UserError(f"config: {name} is a folder, a YAML file is needed")
        if not os.path.isfile(name):
            raise UserError(f"config: {name}: no such file")
        try:
            with open(name, encoding="utf-8-sig") as f:
                text = f.read()
            if yaml.load(text, Loader) is None:  # noqa: S506  (a SafeLoader with one check more)
                raise UserError(f"config: {name} is empty")
        except UnicodeDecodeError as e:
            raise UserError(f"config: {name} is not UTF-8 ({e.reason} at byte {e.start + 1})") from e
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            raise UserError(f"config: {name}: not YAML, line {mark.line + 1}, column {mark.column + 1}: {e.problem}") from e
        except yaml.YAMLError as e:
            raise UserError(f"config: {name}: not YAML ({' '.join(str(e).split())})") from e


def take(
    argv: list[str],
    name: str,        # such as --resume
):                    # its value or None, and the rest
    "One option out of a command line, in either way of writing it."
    rest, value, n = [], None, 0
    while n < len(argv):
        if argv[n] == name:
            if n + 1 == len(argv) or argv[n + 1].startswith("--"):
                raise UserError(f"{name[2:]} needs a run folder: {name} runs/...")
            value, n = argv[n + 1], n + 2
        elif argv[n].startswith(f"{name}="):
            value, n = argv[n].split("=", 1)[1], n + 1
        else:
            rest.append(argv[n])
            n += 1
    return value, rest


# ---------------------------------------------------------------------------------------------------------------------
# commands
# ---------------------------------------------------------------------------------------------------------------------
def _train(command, argv):
    from llm_train_course.app.engine import HELP, long_flags, restarted

    resume, rest = take(long_flags(argv), "--resume")
    _check_yaml(rest)
    _quiet()
    from llm_train_course.app import train
    from llm_train_course.app.runs import CONFIG, read_config

    recipe = train.TRAINING[command][0]
    if resume is None:
        if "--help" in rest or "-h" in rest:
            make_parser(command, recipe).print_help()
            print("  --resume RUN          go on with a run that was stopped; its fields come from its config.yaml")
            print(HELP)
            return 0
        made = parse(command, recipe, rest)
        if not restarted(made.out):
            return train.start(command, made)
        resume = made.out
    config = read_config(resume)
    made_by = config["run"].get("command")
    if made_by != command:
        raise UserError(f"resume: {resume} was made by llm-train {made_by}: llm-train {made_by} --resume {resume}")
    base = ["--config", os.path.join(os.path.expanduser(resume), CONFIG)]
    old, new = parse(command, recipe, base), parse(command, recipe, base + rest)
    changed = train.differences(train.plain(old), train.plain(new))
    if changed:
        raise UserError("resume: a run goes on with the fields it was started with; changed: "
                        + "; ".join(f"{name} was {a!r}, now {b!r}" for name, a, b in changed))
    if new.out and os.path.abspath(new.out) != os.path.abspath(resume):
        raise UserError(f"out: {new.out} is not the run that is continued ({resume})")
    return train.start(command, new, resume)


def _eval(argv):
    _check_yaml(argv)
    _quiet()
    from llm_train_course.app.train import EvalRecipe, evaluate_model

    if "--help" in argv or "-h" in argv:
        make_parser("eval", EvalRecipe, "model").print_help()
        return 0
    return evaluate_model(*parse("eval", EvalRecipe, argv, "model"))


def _plain_parser(command, text):
    from argparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message):
            raise UserError(message)

    return Parser(prog=f"llm-train {command}", description=text, allow_abbrev=False)


def _chat(argv):
    p = _plain_parser("chat", "Talk to a model. With a pipe on stdin: one prompt a line, one answer a line "
                              "(line breaks in it written as \\n), each a conversation of its own. A reward model is given a prompt, "
                              "a tab and an answer, and says the answer's score.")
    p.add_argument("model", help="a run folder, a model folder, a hub name, or smollm2")
    p.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token (default)")
    p.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default 256)")
    p.add_argument("--system", help="a system message")
    p.add_argument("--seed", type=int, default=0, help="of the sampling")
    p.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: fp32, or what a 4-bit base was made from)")
    p.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    args = p.parse_args(argv)
    _quiet()
    from llm_train_course.app.chat import chat

    return chat(args.model, args.temperature, args.max_new_tokens, args.system, args.seed, args.dtype, args.cpu)


def _merge(argv):
    p = _plain_parser("merge", "Add an adapter to the base it was trained on, and write a model folder that transformers loads alone. "
                               "A 4-bit base is dequantized first; the sum is not quantized again, which would round it to sixteen "
                               "levels once more and give another model than the one trained.")
    p.add_argument("run", help="a run folder of lora, qlora or sft, or an adapter's folder")
    p.add_argument("--out", help="folder of the model (default: RUN-merged)")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of its weights (default: that of the run's)")
    p.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    args = p.parse_args(argv)
    _quiet()
    from llm_train_course.app.adapters import merge_run

    return merge_run(args.run, args.out, args.dtype, args.cpu)


def _demo(argv):
    p = _plain_parser("demo", "The main job, under eight minutes on two cores: (a) the small world through its stages, pretraining, "
                              "fine-tuning, a reward model with PPO, and DPO; (b) SmolLM2-135M-Instruct, fine-tuned with LoRA and with QLoRA "
                              "on the course's interview questions, and by DPO on its claims. Ends with tables and report.html.")
    p.add_argument("--out", help="run folder (default: the next free runs/demo-<n>)")
    p.add_argument("--seed", type=int, default=0, help="of the world, the data order and the adapters")
    args = p.parse_args(argv)
    _quiet()
    from llm_train_course.app.demo import demo

    return demo(args.out, args.seed)


def _quiet():
    "Libraries say much that is not for the user of this command."
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Threads that spin while they wait make a step ten times slower as soon as something else runs on the machine.
    # Read when torch is loaded, so it has to be set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():  # a log file wants a line now and then, not ten a second
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    if "transformers" in sys.modules or os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def _warn(message, category, filename, lineno, file=None, line=None):
    "Only what is about the user's run; the rest is for developers (--debug shows it)."
    if category.__module__.startswith("llm_train_course"):
        print(f"warning: {message}", file=sys.stderr)


def main(
    argv: list[str] | None = None,  # without the program's name; None: those of the process
) -> int:                           # exit code: 0 done, 1 failed, 2 refused, 130 stopped
    "The command `llm-train`."
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    if argv and argv[0].startswith("--local_rank="):  # from the deepspeed launcher; it is in the environment too
        del argv[0]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"llm-train {__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"llm-train: no command {command!r}; {hint}", file=sys.stderr)
        return _BAD
    if debug:
        return _dispatch(command, rest)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            return _dispatch(command, rest)
        except DataError as e:
            print(f"{e}" if len(e.problems) > 1 else f"llm-train {command}: {e}", file=sys.stderr)
            return _BAD
        except UserError as e:
            print(f"llm-train {command}: {e}", file=sys.stderr)
            return _BAD
        except KeyboardInterrupt:
            print(f"\nllm-train {command}: stopped; nothing was written", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except SystemExit as e:  # --help
            return int(e.code or 0)
        except Exception as e:
            return _failed(command, e)


def _dispatch(command, argv):
    if command in _TRAINING:
        return _train(command, argv)
    return {"eval": _eval, "chat": _chat, "merge": _merge, "demo": _demo}[command](argv)


def _failed(command, error):
    "One line for what went wrong in the work itself."
    kind = type(error).__name__
    if kind == "ResumeError":
        print(f"llm-train {command}: resume: {error}", file=sys.stderr)
        return _BAD
    if kind == "RewardError":  # its message says which function, and on which answer
        print(f"llm-train {command}: {error}", file=sys.stderr)
        return _BAD
    if kind == "NonFiniteLoss":  # its message says which step, and where the batch is saved
        print(f"llm-train {command}: {error}", file=sys.stderr)
        return 1
    text = " ".join(str(error).split()) or "no message"
    print(f"llm-train {command}: failed: {kind}: {text[:600]} (--debug shows where)", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
