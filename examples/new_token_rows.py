"""Teach a small GPT-2 new words: the embedding's rows for new tokens train, and every old row keeps its bits.

The text is the opening of Shakespeare's Sonnet 18; three of its words become tokens that the tokenizer has never seen.
The network has random weights, so that nothing is downloaded; the rules are the same for a pretrained one.
"""

from __future__ import annotations

import argparse

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from freezehooks import FrozenEntries, MaskedOptimizer, train_only

# William Shakespeare, Sonnet 18, lines 1 to 8 (1609; in the public domain)
SONNET = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd,
And every fair from fair sometime declines,
By chance, or nature's changing course untrimm'd:"""

NEW_TOKENS = {"thee": "<friend>", "summer": "<season>", "heaven": "<sky>"}


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the sonnet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=letters, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(SONNET.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def small_gpt2(rows: int, tied: bool) -> GPT2LMHeadModel:
    """Make a GPT-2 whose output head shares the embedding's weight (tied), or has its own."""
    config = GPT2Config(vocab_size=rows, n_positions=256, n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=tied)
    config.bos_token_id = config.eos_token_id = 0
    model = GPT2LMHeadModel(config)
    model.eval()  # without dropout
    return model


def train_new_rows_alone(model: GPT2LMHeadModel, old: int) -> FrozenEntries:
    """Train only the rows from `old` on, in the embedding and, if it has its own weight, in the head."""
    tied = model.lm_head.weight is model.transformer.wte.weight
    matrices = ["transformer.wte"] if tied else ["transformer.wte", "lm_head"]
    return train_only(model, [f"{matrix}[{old}:]" for matrix in matrices])


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    return sum(item.nbytes for state in optimizer.state.values() for item in state.values() if torch.is_tensor(item))


def chance_of_new_tokens(model: GPT2LMHeadModel, tokens: Tensor, old: int) -> float:
    """Return the mean probability of the new tokens at their positions in the text."""
    with torch.no_grad():
        chances = model(input_ids=tokens).logits[0, :-1].softmax(-1)
    following = tokens[0, 1:]
    return float(chances[following >= old, following[following >= old]].mean())


def train_new_rows(tied: bool, steps: int) -> None:
    """Extend tokenizer and model, train what is new, and print what moved."""
    torch.manual_seed(0)
    tokenizer = trained_tokenizer()
    old = len(tokenizer)
    model = small_gpt2(old, tied)
    tokenizer.add_tokens(list(NEW_TOKENS.values()))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # replaces the matrices: before freezing
    text = SONNET
    for word, token in NEW_TOKENS.items():
        text = text.replace(word, token)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]

    frozen = train_new_rows_alone(model, old)
    before = {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}
    chance = chance_of_new_tokens(model, tokens, old)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = MaskedOptimizer(torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1), frozen, compact=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    free = sum(part.free_count for part in frozen.values())
    print(f"{'tied' if tied else 'untied'} head, {steps} steps")
    print(f"  entries that train: {free:,} of {model.num_parameters():,}")
    print(f"  bytes of optimizer state: {bytes_of_state(optimizer):,}")
    print(f"  chance of a new token: {chance:.4f} before, {chance_of_new_tokens(model, tokens, old):.4f} after")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        now, then = model.get_parameter(name).detach(), before[name]
        same = now[:old].view(torch.int32).equal(then[:old].view(torch.int32))
        moved = int((now[old:] != then[old:]).any(dim=1).sum())
        print(f"  {name}: {old} old rows bit-equal: {same}; new rows that moved: {moved} of {len(now) - old}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the rows of new tokens alone, with a tied and an untied head.")
    parser.add_argument("--steps", type=int, default=100, help="steps of training (%(default)s)")
    steps = parser.parse_args().steps
    for tied in (True, False):
        train_new_rows(tied, steps)


if __name__ == "__main__":
    main()
