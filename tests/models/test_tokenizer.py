"""The prompt tokenizer against transformers' fast tokenizer, on small vocabularies trained here."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from wanrt.errors import WeightsError
from wanrt.models.text_cleaning import clean_prompt
from wanrt.models.tokenizer import PromptTokenizer

CORPUS = [
    "a red ball bouncing over a blue night sky",
    "a green star spinning above the sea at sunset",
    "two yellow squares fall through a grey fog, slowly",
    "夜の海の上で跳ねる赤いボール",
] * 8
SPECIAL = ["<pad>", "</s>", "<unk>"]
PROMPTS = ["a red ball", "a green star spinning above the fog, slowly", "夜の赤いボール &amp; 海", "x" * 30]


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


@pytest.fixture(params=[unigram, word_level], ids=["unigram", "wordlevel"])
def tokenizer_file(request, tmp_path):
    tokenizer = request.param()
    # As in google/umt5-xxl: the template appends </s>. A file may also carry settings of its own.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("text_len", [4, 12, 512])
def test_equals_transformers(tokenizer_file, text_len):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    want = reference(
        [clean_prompt(p) for p in PROMPTS],
        padding="max_length",
        truncation=True,
        max_length=text_len,
        return_tensors="pt",
    )
    ids, mask, _ = PromptTokenizer.from_file(tokenizer_file, text_len)(PROMPTS)
    assert ids.equal(want.input_ids)
    assert mask.equal(want.attention_mask)


def test_truncation_is_reported_exactly_at_the_limit(tokenizer_file):
    short = PromptTokenizer.from_file(tokenizer_file, 512)
    ids, mask, truncated = short([CORPUS[0]])
    tokens = int(mask.sum())
    assert truncated == [False]
    assert PromptTokenizer.from_file(tokenizer_file, tokens)([CORPUS[0]])[2] == [False]
    cut_ids, cut_mask, cut = PromptTokenizer.from_file(tokenizer_file, tokens - 1)([CORPUS[0]])
    assert cut == [True]
    assert cut_mask.all()
    assert cut_ids[0, -1] == short.eos_id
    assert cut_ids[0, :-1].equal(ids[0, : tokens - 2])


def test_empty_prompt_is_a_lone_eos(tokenizer_file):
    tokenizer = PromptTokenizer.from_file(tokenizer_file, 8)
    ids, mask, truncated = tokenizer(["  \n"])
    assert ids[0].tolist() == [tokenizer.eos_id] + [tokenizer.pad_id] * 7
    assert mask[0].tolist() == [1] + [0] * 7
    assert truncated == [False]


def test_unknown_words_are_named_once_as_they_stand(tokenizer_file):
    tokenizer = PromptTokenizer.from_file(tokenizer_file, 8)
    assert tokenizer.unknown_words("a red ball  spinning") == ()
    found = tokenizer.unknown_words("a red \u0416\u0416 ball \u0416\u0416")
    assert set("".join(found)) == {"\u0416"}
    assert len(set(found)) == len(found)


def test_ten_kilobytes_are_cut(tokenizer_file):
    ids, mask, truncated = PromptTokenizer.from_file(tokenizer_file, 64)(["red ball " * 1200])
    assert truncated == [True]
    assert mask.all()
    assert ids.shape == (1, 64)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff garbage", b'{"model": {"type": "Nonsense"}}'])
def test_bad_file_is_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"not a Hugging Face tokenizer\.json") as caught:
        PromptTokenizer.from_file(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(WeightsError, match="no such file"):
            PromptTokenizer.from_file(path)


def test_vocabulary_without_eos(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>")).save(str(path))
    with pytest.raises(WeightsError, match="no </s> token"):
        PromptTokenizer.from_file(path)


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("  a red\n\tball  ", "a red ball"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("caf\u00c3\u00a9 at night", "café at night"),
        ("“quoted” text", '"quoted" text'),
        ("a&nbsp;b\u3000c", "a b c"),
        ("A Red BALL, falling!", "A Red BALL, falling!"),
        ("", ""),
    ],
)
def test_cleaning(raw, want):
    assert clean_prompt(raw) == want
