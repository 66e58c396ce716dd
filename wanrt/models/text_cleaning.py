"""Prompt cleaning, the same steps that Wan2.1 was trained with.

Source of the steps and their order: Wan-Video/Wan2.1 `wan/modules/tokenizers.py` at 9737cba
(`basic_clean`, then `whitespace_clean`: the text encoder is built with `clean="whitespace"`).
"""

from __future__ import annotations

import html
import re

import ftfy

_WHITESPACE = re.compile(r"\s+")


def clean_prompt(text: str) -> str:
    """Repair mojibake, unescape HTML twice, and fold every run of white space into one space.

    HTML is unescaped twice because web captions are often escaped twice (`&amp;amp;`).
    Case and punctuation stay.
    """
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITESPACE.sub(" ", unescaped).strip()
