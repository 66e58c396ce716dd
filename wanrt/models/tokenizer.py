"""Prompts to token ids, through the `tokenizers` library and a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from wanrt.errors import WeightsError
from wanrt.models.text_cleaning import clean_prompt

EOS, PAD = "</s>", "<pad>"  # UMT5's names: google/umt5-xxl tokenizer.json, ids 1 and 0
UNKNOWN = "<unk>"  # its id 2


class PromptTokenizer:
    """Cleans prompts and turns them into ids of one fixed length, as transformers' UMT5 tokenizer does.

    One `</s>` ends every prompt, `<pad>` fills it up to `text_len`. A prompt of more than `text_len - 1`
    tokens is cut there (the `</s>` stays) and reported, so that the command line can warn.
    """

    def __init__(self, tokenizer: Tokenizer, text_len: int = 512) -> None:
        """Raises WeightsError when the vocabulary lacks `</s>` or `<pad>`."""
        if text_len < 1:
            raise ValueError(f"text_len is {text_len}; at least 1 is needed for the {EOS} token")
        # A tokenizer.json may carry truncation and padding of its own: lengths are decided here alone.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.eos_id = _special_id(tokenizer, EOS)
        self.pad_id = _special_id(tokenizer, PAD)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], text_len: int = 512) -> PromptTokenizer:
        """Read a `tokenizer.json`. Raises WeightsError for a file that is missing or is no tokenizer."""
        if not Path(path).is_file():
            raise WeightsError(f"{path}: no such file; expected a Hugging Face tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            reason = " ".join(str(error).split())[:120]
            raise WeightsError(f"{path}: not a Hugging Face tokenizer.json ({reason})") from error
        return cls(tokenizer, text_len)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.tokenizer.get_vocab_size()

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """What the vocabulary has no token for, as it stands in the prompt, each once: it has no meaning."""
        text = clean_prompt(prompt)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown]
        return tuple(dict.fromkeys(text[start:end] for start, end in spans))

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor, list[bool]]:
        """Return ids and mask, both [B, text_len] int64 (mask 1 up to the `</s>`), and which were cut."""
        # `add_special_tokens=False`, then our own </s>: equal to the template in UMT5's tokenizer.json, and
        # the same for a file that lost its post-processor.
        texts = [clean_prompt(prompt) for prompt in prompts]
        rows = [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        room = self.text_len - 1
        ids = torch.full((len(rows), self.text_len), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            tokens = [*row[:room], self.eos_id]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        return ids, mask, [len(row) > room for row in rows]


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise WeightsError(f"the tokenizer has no {token} token; expected UMT5's tokenizer.json")
    return found
