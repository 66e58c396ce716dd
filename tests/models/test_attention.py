"""Biased attention against an fp64 softmax written out."""

import math
import sys
from types import ModuleType

import pytest
import torch

from wanrt.models import attention, flash4
from wanrt.models.attention import (
    AttentionBackend,
    Default,
    KeyBias,
    TextSpan,
    attend,
    attend_text,
    choices,
    choices_for_text,
    choose,
    choose_for_text,
    why_not,
)
from wanrt.script.job import ATTENTIONS

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

ON_CPU = [AttentionBackend.AUTO, AttentionBackend.SDPA, AttentionBackend.MATH, AttentionBackend.TRITON]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def softmax_attention(q, k, v, log_bias=0.0, keys=0):
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores[..., :keys] += log_bias
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def draw_qkv(dtype, tq, tk, *, heads=3, dim=16, device="cpu"):
    generator = torch.Generator().manual_seed(tq * 100 + tk)
    shapes = ((2, tq, heads, dim), (2, tk, heads, dim), (2, tk, heads, dim))
    return [torch.randn(s, generator=generator).to(device=device, dtype=dtype) for s in shapes]


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for flash-attn-4 that computes in fp64; gives the list of its calls' shapes."""
    calls = []

    def flash_attn_func(q, k, v, *, return_lse):
        assert return_lse
        calls.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
        return softmax_attention(q, k, v).to(q.dtype).contiguous(), scores.logsumexp(-1).float()

    package, module = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(flash4, "HAVE_FLASH_4", True)
    return calls


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("tq", "tk", "keys"), [(5, 9, 4), (7, 7, 0), (1, 3, 2), (33, 130, 65)])
@pytest.mark.parametrize("b", [1.0, 0.3, 1e-4])
def test_attend_equals_softmax(dtype, backend, tq, tk, keys, b):
    q, k, v = draw_qkv(dtype, tq, tk)
    got = attend(q, k, v, KeyBias(torch.tensor(b).log(), keys), backend=backend)
    assert got.dtype == dtype
    error = (got.double() - softmax_attention(q, k, v, math.log(b), keys)).abs().max().item()
    assert error <= TOLERANCES[dtype]


def test_no_bias_is_plain_attention():
    q, k, v = draw_qkv(torch.float32, 4, 6)
    torch.testing.assert_close(attend(q, k, v).double(), softmax_attention(q, k, v), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tq", "tk", "keys"), [(5, 9, 4), (33, 130, 65)])
@pytest.mark.parametrize("b", [1.0, 0.3, 1e-4])
def test_two_calls_of_flash_attention_4_are_merged(flash_attn, dtype, tq, tk, keys, b):
    q, k, v = draw_qkv(dtype, tq, tk)
    got = attend(q, k, v, KeyBias(torch.tensor(b).log(), keys), backend=AttentionBackend.FA4)
    assert flash_attn == [((2, tq, 3, 16), *[(2, n, 3, 16)] * 2) for n in (tk - keys, keys)]
    assert got.dtype == dtype
    error = (got.double() - softmax_attention(q, k, v, math.log(b), keys)).abs().max().item()
    assert error <= TOLERANCES[dtype]


def test_flash_attention_4_without_bias_is_one_call(flash_attn):
    q, k, v = draw_qkv(torch.float16, 4, 6)
    got = attend(q, k, v, backend=AttentionBackend.FA4)
    assert len(flash_attn) == 1
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), softmax_attention(q, k, v), rtol=0, atol=2e-3)


def test_flash_attention_4_compiles_into_one_graph(flash_attn):
    q, k, v = draw_qkv(torch.float16, 4, 6)
    bias = KeyBias(torch.tensor(-1.0), 2)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(q, k, v, bias, backend=AttentionBackend.FA4)
    assert torch.equal(got, attend(q, k, v, bias, backend=AttentionBackend.FA4))


def test_flash_attention_4_is_a_valid_operator(flash_attn):
    torch.library.opcheck(flash4.flash_4, tuple(draw_qkv(torch.float16, 4, 6)))


@pytest.mark.parametrize("backend", ON_CPU)
def test_views_of_a_buffer_need_no_copies(backend):
    """Keys that are a slice of a longer buffer, filled with NaN elsewhere."""
    q, k, v = draw_qkv(torch.float32, 4, 12)
    long_k, long_v = (torch.full((2, 20, 3, 16), torch.nan) for _ in range(2))
    long_k[:, 5:17], long_v[:, 5:17] = k, v
    got = attend(q, long_k[:, 5:17], long_v[:, 5:17], KeyBias(torch.tensor(-1.0), 3), backend=backend)
    torch.testing.assert_close(got.double(), softmax_attention(q, k, v, -1.0, 3), rtol=0, atol=2e-6)


def test_auto_on_a_cpu_is_torch_and_force_is_force():
    for backend, chosen in ((AttentionBackend.AUTO, AttentionBackend.SDPA), (AttentionBackend.MATH,) * 2):
        assert choose(backend, CPU, torch.bfloat16, 128, rows=1, biased=True) is chosen
        assert choices(backend, CPU, torch.bfloat16, 128, biased=True) == (chosen,)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "chosen"),
    [
        (9, torch.bfloat16, 128, AttentionBackend.HOPPER),
        (9, torch.bfloat16, 64, AttentionBackend.CUDNN),
        (10, torch.float16, 64, AttentionBackend.CUDNN),
        (8, torch.bfloat16, 128, AttentionBackend.FLASH),
        (12, torch.bfloat16, 128, AttentionBackend.FLASH),
        (7, torch.float16, 128, AttentionBackend.SDPA),
        (9, torch.float32, 128, AttentionBackend.SDPA),
        (9, torch.bfloat16, 20, AttentionBackend.SDPA),
    ],
)
def test_auto_on_cuda_goes_by_the_table(monkeypatch, capability, dtype, head_dim, chosen):
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    assert choose(AttentionBackend.AUTO, CUDA, dtype, head_dim, rows=100, biased=False) is chosen


def test_table_may_go_by_rows_and_bias(monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    few = Default(AttentionBackend.TRITON, range(9, 10), biased=True, most_rows=1000)
    monkeypatch.setattr(attention, "CUDA_DEFAULTS", (few, *attention.CUDA_DEFAULTS))

    def chosen(rows, biased):
        return choose(AttentionBackend.AUTO, CUDA, torch.bfloat16, 128, rows=rows, biased=biased)

    assert chosen(1000, True) is AttentionBackend.TRITON
    assert chosen(1001, True) is chosen(1000, False) is AttentionBackend.HOPPER
    both = choices(AttentionBackend.AUTO, CUDA, torch.bfloat16, 128, biased=True)
    assert both == (AttentionBackend.TRITON, AttentionBackend.HOPPER)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "chosen"),
    [
        (9, torch.bfloat16, 128, AttentionBackend.HOPPER),
        (9, torch.bfloat16, 64, AttentionBackend.TRITON),
        (8, torch.float16, 64, AttentionBackend.TRITON),
        (9, torch.bfloat16, 40, AttentionBackend.CUDNN),  # not a multiple of 16
        (9, torch.float32, 128, AttentionBackend.SDPA),
        (7, torch.float16, 128, AttentionBackend.SDPA),
    ],
)
def test_auto_for_a_text_is_who_takes_its_span(monkeypatch, capability, dtype, head_dim, chosen):
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    monkeypatch.setattr(attention, "HAVE_TRITON", True)
    assert choices_for_text(AttentionBackend.AUTO, CUDA, dtype, head_dim) == (chosen,)
    forced = choose_for_text(AttentionBackend.FLASH, CUDA, dtype, head_dim, rows=100)
    assert forced is AttentionBackend.FLASH


def test_auto_for_a_text_without_triton_is_who_attends_to_video(monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    monkeypatch.setattr(attention, "HAVE_TRITON", False)
    assert choices_for_text(AttentionBackend.AUTO, CUDA, torch.bfloat16, 64) == (AttentionBackend.CUDNN,)


def test_text_costs_its_own_keys_and_one_for_its_padding():
    """Whatever lies behind the first key of the padding is not attended to by who takes a span, only by others."""
    embeddings = torch.zeros(2, 9, 4)
    embeddings[0, :3], embeddings[1, :7] = 1.0, -1.0
    embeddings[1, 2] = 0.0  # a zero between tokens is a token
    span = TextSpan.of(embeddings)
    assert span.count.tolist() == [4, 8]
    torch.testing.assert_close(span.last_bias, torch.tensor([6.0, 2.0]).log())
    q, k, v = draw_qkv(torch.float32, 5, 9)
    for entry, count in enumerate((4, 8)):
        for x in (k, v):
            x[entry, count:] = x[entry, count - 1]
    expected = softmax_attention(q, k, v)
    for backend in (AttentionBackend.TRITON, AttentionBackend.AUTO, AttentionBackend.MATH):
        got = attend_text(q, k, v, span, backend=backend)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)
    k[0, 4:], k[1, 8:] = 3.0, 3.0
    got = attend_text(q, k, v, span, backend=AttentionBackend.TRITON)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("installed", "chosen"), [(True, AttentionBackend.FA4), (False, AttentionBackend.HOPPER)]
)
def test_line_of_what_is_not_installed_does_not_count(monkeypatch, installed, chosen):
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    monkeypatch.setattr(attention, "HAVE_FLASH_4", installed)
    line = Default(AttentionBackend.FA4, range(9, 11))
    monkeypatch.setattr(attention, "CUDA_DEFAULTS", (line, *attention.CUDA_DEFAULTS))
    assert choices(AttentionBackend.AUTO, CUDA, torch.bfloat16, 128, biased=True) == (chosen,)


def test_choosing_is_traced(monkeypatch):
    """Layers are compiled whole, and the table is looked up inside them."""
    monkeypatch.setattr(attention, "_capability", lambda device: 9)

    @torch.compile(fullgraph=True, backend="eager")
    def chosen_plus(x):
        backend = choose(AttentionBackend.AUTO, CUDA, torch.bfloat16, 128, rows=x.shape[0], biased=True)
        return x + (1 if backend is AttentionBackend.HOPPER else 2)

    assert torch.equal(chosen_plus(torch.zeros(3)), torch.ones(3))


def test_command_line_has_every_backend():
    assert set(ATTENTIONS) == set(AttentionBackend)


@pytest.mark.parametrize("backend", AttentionBackend)
def test_a_cpu_runs_what_torch_can(backend):
    reason = why_not(backend, CPU, torch.bfloat16, 128)
    anywhere = (AttentionBackend.AUTO, AttentionBackend.SDPA, AttentionBackend.MATH)
    assert reason == (None if backend in anywhere else "cpu is not a CUDA device")


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "reason"),
    [
        (AttentionBackend.FLASH, torch.float32, 128, "torch.float32 is not a half precision"),
        (AttentionBackend.CUDNN, torch.float32, 128, "torch.float32 is not a half precision"),
        (AttentionBackend.CUDNN, torch.bfloat16, 20, "heads of 20, not of a multiple of 8 up to 128"),
        (AttentionBackend.FA4, torch.float32, 128, "torch.float32 is not a half precision"),
        (AttentionBackend.FA4, torch.bfloat16, 136, "heads of 136, not of a multiple of 8 up to 128"),
        (AttentionBackend.TRITON, torch.float32, 128, None),
        (AttentionBackend.TRITON, torch.bfloat16, 40, "heads of 40, not of a multiple of 16 up to 128"),
    ],
)
def test_what_a_gpu_cannot_run_is_said(monkeypatch, backend, dtype, head_dim, reason):
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    monkeypatch.setattr(attention, "HAVE_TRITON", True)
    assert why_not(backend, CUDA, dtype, head_dim) == reason


def test_triton_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    monkeypatch.setattr(attention, "HAVE_TRITON", False)
    assert why_not(AttentionBackend.TRITON, CUDA, torch.bfloat16, 128) == "Triton is not installed"


@pytest.mark.parametrize("capability", [8, 9, 10, 11, 12])
def test_flash_attention_4_runs_on_some_gpus(monkeypatch, flash_attn, capability):
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    reason = why_not(AttentionBackend.FA4, CUDA, torch.bfloat16, 128)
    refused = f"compute capability {capability}, not 9, 10 or 12"
    assert reason == (refused if capability in (8, 11) else None)


def test_flash_attention_4_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    monkeypatch.setattr(flash4, "HAVE_FLASH_4", False)
    reason = why_not(AttentionBackend.FA4, CUDA, torch.bfloat16, 128)
    assert reason == "flash-attn-4 is not installed; pip install 'wanrt[fa4]'"


def test_flash_attention_4_that_is_broken_is_said(monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    monkeypatch.setattr(flash4, "HAVE_FLASH_4", True)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)  # importing it fails
    reason = why_not(AttentionBackend.FA4, CUDA, torch.bfloat16, 128)
    assert reason.startswith("flash-attn-4 cannot be imported: ModuleNotFoundError: ")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", AttentionBackend)
@pytest.mark.parametrize(("tq", "tk", "keys"), [(2160, 4320, 1440), (720, 1440, 0), (333, 1001, 500)])
def test_attend_equals_softmax_on_cuda(dtype, backend, tq, tk, keys):
    if reason := why_not(backend, torch.device("cuda", torch.cuda.current_device()), dtype, 128):
        torchs = (AttentionBackend.CUDNN, AttentionBackend.FLASH)
        elsewhere = (AttentionBackend.FA4, AttentionBackend.HOPPER)
        assert backend in elsewhere or (backend in torchs and dtype is torch.float32), reason
        pytest.skip(reason)
    q, k, v = draw_qkv(dtype, tq, tk, heads=2, dim=128, device="cuda")
    bias = torch.tensor(0.3, device="cuda").log()
    got = attend(q, k, v, KeyBias(bias, keys), backend=backend)
    error = (got.double() - softmax_attention(q, k, v, math.log(0.3), keys)).abs().max().item()
    assert error <= TOLERANCES[dtype]


@pytest.fixture
def real_flash_attn():
    if reason := why_not(AttentionBackend.FA4, torch.device("cuda", 0), torch.bfloat16, 128):
        pytest.skip(reason)


@pytest.mark.gpu
def test_flash_attention_4_is_what_its_operator_says(real_flash_attn):
    q, k, v = draw_qkv(torch.bfloat16, 333, 1001, dim=128, device="cuda")
    torch.library.opcheck(flash4.flash_4, (q, k[:, 500:], v[:, 500:]))


@pytest.mark.gpu
def test_flash_attention_4_is_captured(real_flash_attn):
    """Both calls, on their two streams, in one graph that reads the bias and the queries anew."""
    q, k, v = draw_qkv(torch.bfloat16, 333, 1001, dim=128, device="cuda")
    bias = KeyBias(torch.zeros((), device="cuda"), 500)
    attend(q, k, v, bias, backend=AttentionBackend.FA4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, bias, backend=AttentionBackend.FA4)
    bias.value.fill_(-2.0)
    q.mul_(0.5)
    graph.replay()
    assert torch.equal(out, attend(q, k, v, bias, backend=AttentionBackend.FA4))
