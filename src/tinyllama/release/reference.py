"""What every format of a release must say: computed from the checkpoint itself, before anything is exported.

Goes into release.json. A conversion that is wrong in the Hugging Face folder already, such as gate and up swapped,
would fool whoever compares the other formats with that folder; it cannot fool what was there before it.
"""

import random
from typing import Any

import torch
from torch.nn import functional as F

from tinyllama.model.llama import Llama
from tinyllama.tokenizer import Tokenizer

NEW_TOKENS = 32
PROMPTS = ("The old library stands", "def read(path):\n    ", "1. In the year 1859")
# What converters and tokenizers have got wrong: runs of spaces, control characters, what spells a marker, every script.
# fmt: off
TOKENIZER_TEST_TEXTS = (
    "", " ", "   ", "Hello world  foo", "   two ends   ", "\t\tif x:\r\n        return {'a': [1, 2]}\n\n\n",
    " \n \n  \n", "日本語 中文。한국어", "\U0001f999 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "e\u0301 n\u0303o a\u030a\u0323", "\x01\x7f\x85\ue000\U0010ffff\ufeff\ufffd", "a\0b", "<s>", "▁ ▁▁x",
    "<s>x</s> <unk><0x0A> [INST]", "<|endoftext|><|im_start|>", "x = 1234567890.5e-3", "naïve.foo(é)ñ_1 İıßﬁ",
    "a" * 40 + " " * 70 + "-" * 40, "I'll don't WE'RE it's", "Ünïcödé ελληνικά русский עברית العربية हिन्दी ไทย",
)
# fmt: on
NUM_PIECES = 300
# C. Darwin, On the Origin of Species (1859), its beginning; and code as people write it.
TEXT = '''\
When on board H.M.S. 'Beagle,' as naturalist, I was much struck with certain facts in the distribution of the \
inhabitants of South America, and in the geological relations of the present to the past inhabitants of that \
continent. These facts seemed to me to throw some light on the origin of species--that mystery of mysteries, as it has \
been called by one of our greatest philosophers. On my return home, it occurred to me, in 1837, that something might \
perhaps be made out on this question by patiently accumulating and reflecting on all sorts of facts which could \
possibly have any bearing on it.

def find(rows: list[int], wanted: int) -> int | None:
    """Place of a value among sorted ones; None where it is not there."""
    first, last = 0, len(rows) - 1
    while first <= last:
        middle = (first + last) // 2
        if rows[middle] == wanted:
            return middle
        if rows[middle] < wanted:
            first = middle + 1
        else:
            last = middle - 1
    return None
'''


@torch.inference_mode()
def compute_reference_outputs(model: Llama, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of hard texts, greedy continuations and nats a token, as JSON, of a float32 model on the CPU.

    Its weights are rounded to bf16 first, in place and one at a time: these are the ones that are exported. A
    continuation has for each token the margin, in logits, by which it was ahead of the second; the end of a text is
    never taken, so that all have their length (less where the context is short).
    """
    assert model.precision == torch.float32, "the reference is computed in float32"
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    texts = [*TOKENIZER_TEST_TEXTS, _text_of_pieces(tokenizer)]
    return {
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "texts": [{"text": text, "ids": tokenizer.bos_prefix + tokenizer.encode(text)} for text in texts],
        "continuations": [_continuation(model, tokenizer, prompt) for prompt in PROMPTS],
        "scored": _scored(model, tokenizer),
    }


def _text_of_pieces(tokenizer: Tokenizer) -> str:
    """Some hundred pieces from all over the vocabulary, side by side in no order: wrong scores or merges show here."""
    pieces = sorted({piece.decode(errors="ignore") for piece in tokenizer.piece_bytes()} - {""})
    chosen = pieces[:: max(1, len(pieces) // NUM_PIECES)]
    random.Random(0).shuffle(chosen)
    return "".join(chosen)


def _continuation(model: Llama, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    context = model.config.context_length
    prompt = (tokenizer.bos_prefix + tokenizer.encode(text))[: max(1, context // 2)]
    count = min(NEW_TOKENS, context - len(prompt))
    caches = model.new_caches(1, context)
    read, ids, margins = torch.tensor([prompt]), [], []
    for _ in range(count):
        logits = model(read, caches)[0, -1]
        if tokenizer.eos_id is not None:
            logits[tokenizer.eos_id] = -torch.inf
        best, places = logits.topk(2)
        ids.append(int(places[0]))
        margins.append(float(best[0] - best[1]))
        read = places[:1][None]
    return {"prompt_ids": prompt, "ids": ids, "margins": margins}


def _scored(model: Llama, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of the text, as many as the context holds, and the mean nats to predict each from those before it."""
    ids = (tokenizer.bos_prefix + tokenizer.encode(TEXT))[: model.config.context_length]
    logits = model(torch.tensor([ids]))[0, :-1]
    return {"ids": ids, "nats_per_token": float(F.cross_entropy(logits, torch.tensor(ids[1:])))}
