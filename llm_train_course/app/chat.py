"`llm-train chat`: talk to a model. Answers stream; a pipe on stdin gives one answer a line."
import os
import sys

from llm_train_course.app.runs import UserError, is_reward_model, load_any, model_source

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def prompt_ids(
    tokenizer,
    prompt,       # a string, or messages that end with the user's
) -> list[int]:
    "The tokens that a model is asked to continue."
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def room(
    model,
    n_prompt: int,  # tokens
    wanted: int,    # tokens that are to follow
) -> int:           # 0 or less: the prompt alone fills the context
    "How many tokens can follow a prompt. Beyond its context a model with learned positions fails, the others go astray."
    limit = getattr(model.config, "max_position_embeddings", None)
    return min(wanted, limit - n_prompt) if limit else wanted


def answer(
    model,
    tokenizer,
    prompt,                  # a string, or messages that end with the user's
    max_new_tokens: int,
    temperature: float,      # 0: the most likely token
    streamer=None,           # a transformers streamer
) -> str:
    "One answer, without special tokens."
    import torch

    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=next(model.parameters()).device)
    left = room(model, ids.shape[1], max_new_tokens)
    if left < 1:
        raise UserError(f"the conversation has {ids.shape[1]} tokens, the model's context "
                        f"{model.config.max_position_embeddings}: /reset starts a new one")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=left, streamer=streamer,
                             pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **sampling)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)


def chat(
    name: str,              # run folder, model folder or hub name
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    system: str | None = None,
    seed: int = 0,
    dtype: str | None = None,  # of the weights; None: fp32, or what a 4-bit base was made from
    cpu: bool = False,
) -> int:                   # exit code
    "A conversation in the terminal, or answers to the lines of stdin."
    import torch

    if temperature < 0:
        raise UserError(f"temperature must be at least 0, got {temperature}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    if is_reward_model(model_source(name)):
        return _scores(name, dtype, device)
    model, tokenizer = load_any(name, dtype, device=device)
    model.eval().to(device)
    torch.manual_seed(seed)
    talks = bool(tokenizer.chat_template)
    if system and not talks:
        raise UserError("system: the model has no chat template, so there is no place for a system message")
    start = [{"role": "system", "content": system}] if system else []
    if not sys.stdin.isatty():
        return _lines(model, tokenizer, start if talks else None, max_new_tokens, temperature)
    print(f"{name}" + ("" if talks else " has no chat template: it continues what you type") + f". {HELP}.")
    return _talk(model, tokenizer, start if talks else None, max_new_tokens, temperature)


def _scores(name, dtype, device):
    "A reward model: a prompt, a tab and an answer a line, and the answer's score; on a terminal it asks for both."
    from llm_train_course.app import rewards
    from llm_train_course.app.preferences import score

    model, tokenizer = rewards.load_model(model_source(name), f"model: {name}", dtype or "fp32")
    if tokenizer is None:
        raise UserError(f"model: {name} has no tokenizer")
    model.eval().to(device)
    talks, asks = bool(tokenizer.chat_template), sys.stdin.isatty()
    if asks:
        print(f"{name} is a reward model: it scores an answer. Ctrl-D leaves.")
    while True:
        try:
            line = f"{input('prompt> ')}\t{input('answer> ')}" if asks else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not line:
            return 0
        if not line.strip():
            continue
        prompt, tab, said = line.rstrip("\r\n").partition("\t")
        try:
            if not tab or not prompt.strip() or not said.strip():
                raise UserError("a prompt, a tab and an answer are needed: a reward model scores answers and writes none")
            print(f"{score(model, tokenizer, [{'role': 'user', 'content': prompt}] if talks else prompt, said):.4f}", flush=True)
        except UserError as e:
            print(f"llm-train chat: {e}", file=sys.stderr)
            print("", flush=True)


def _lines(model, tokenizer, start, max_new_tokens, temperature):
    "One prompt a line in, one answer a line out (line breaks written as \\n), each a conversation of its own."
    try:
        for line in sys.stdin:
            text = line.rstrip("\r\n")
            if not text.strip():
                continue
            prompt = text if start is None else [*start, {"role": "user", "content": text}]
            try:
                said = answer(model, tokenizer, prompt, max_new_tokens, temperature)
            except UserError as e:
                print(f"llm-train chat: {e}", file=sys.stderr)
                said = ""
            print(said.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n"), flush=True)
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _talk(model, tokenizer, start, max_new_tokens, temperature):
    from transformers import TextStreamer

    history = list(start or [])
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if text in ("/exit", "/quit"):
            return 0
        if text == "/reset":
            history = list(start or [])
            print("forgotten")
            continue
        if text.startswith("/"):
            print(HELP)
            continue
        if not text:
            continue
        prompt = text if start is None else [*history, {"role": "user", "content": text}]
        try:
            said = answer(model, tokenizer, prompt, max_new_tokens, temperature,
                          TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        except KeyboardInterrupt:
            print("\n(stopped; this turn is not remembered)")
            continue
        except UserError as e:
            print(e)
            continue
        if start is not None:
            history = [*prompt, {"role": "assistant", "content": said}]
