"A tiny model, its tokenizer and a few rows of unequal lengths, used by several test files."
import torch

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
