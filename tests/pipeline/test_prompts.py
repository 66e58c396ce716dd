"""Which embedding a chunk gets, and that no prompt is encoded or said twice."""

import torch

from wanrt.pipeline.prompts import PromptBook
from wanrt.telemetry import Recorder


def test_a_prompt_is_encoded_once_and_said_once(fakes):
    timeline, encode, *_ = fakes
    encoded = []

    def logged(text):
        encoded.append(text)
        return encode(text)

    book = PromptBook(timeline(), logged, Recorder())
    said = [book.changed(chunk) for chunk in range(6)]
    assert [embedding is not None for embedding in said] == [True, False, True, True, True, False]
    assert encoded == ["a", "b"]
    assert torch.equal(said[0], encode("a"))
    assert torch.equal(said[4], encode("b"))
