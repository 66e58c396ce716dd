"""The transformer's passes against oracles that keep everything, in fp64, with complex rotary numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from wanrt.models.attention import AttentionBackend
from wanrt.models.transformer import CachePolicy, KVCache, Pass, TransformerConfig, WanTransformer

TOLERANCE = 2e-5  # fp32 model against fp64 oracle, relative to the oracle's largest value


class Oracle:
    """One forward over any frames, written from the formulas; the caller says who attends to whom."""

    def __init__(self, model):
        self.w = {name: p.double() for name, p in model.state_dict().items()}
        self.c = model.config
        self.d = self.c.dim // self.c.num_heads

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].flatten(1).T + self.w[name + ".bias"]

    def rms(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.c.eps).sqrt() * self.w[name + ".weight"]

    def layer_norm(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + self.c.eps).sqrt()

    def heads(self, x):
        return x.reshape(*x.shape[:2], self.c.num_heads, self.d)

    def rope(self, x, positions, grid):
        """x [B, len(positions) * rows * columns, H, D]; positions are the frames' places."""
        rows, columns = grid
        pairs = self.d // 2
        third = pairs // 3
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], pairs, 2).contiguous())
        frame, row, column = torch.meshgrid(
            torch.as_tensor(positions), torch.arange(rows), torch.arange(columns), indexing="ij"
        )
        angles = []
        for place, n in ((frame, pairs - 2 * third), (row, third), (column, third)):
            frequency = 1.0 / 10000 ** (torch.arange(0, 2 * n, 2).double() / (2 * n))
            angles.append(place.reshape(-1, 1).double() * frequency)
        angle = torch.cat(angles, 1)[None, :, None]
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def softmax_attention(self, q, k, v, mask=0.0):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.d) + mask
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    def time(self, t):
        half = self.c.freq_dim // 2
        angle = t.double()[..., None] * 10000.0 ** (-torch.arange(half).double() / half)
        e = self.linear(torch.cat([angle.cos(), angle.sin()], -1), "time_embedding.0")
        e = self.linear(F.silu(e), "time_embedding.2")
        return e, self.linear(F.silu(e), "time_projection.1").unflatten(-1, (6, -1))

    def text(self, embeddings):
        padded = torch.zeros(embeddings.shape[0], self.c.text_len, self.c.text_dim, dtype=torch.float64)
        padded[:, : embeddings.shape[1]] = embeddings
        x = F.gelu(self.linear(padded, "text_embedding.0"), approximate="tanh")
        return self.linear(x, "text_embedding.2")

    def forward(self, latents, t, embeddings, attend):
        """latents [B, 16, F, h, w]; attend(layer, q, k, v) of un-rotated [B, T, H, D] gives [B, T, C]."""
        b, _, f, h, w = latents.shape
        weight, bias = self.w["patch_embedding.weight"], self.w["patch_embedding.bias"]
        x = F.conv3d(latents.double(), weight, bias, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
        n = x.shape[1] // f
        e, e6 = self.time(t)
        e6 = e6.repeat_interleave(n, 1)
        text = self.text(embeddings)
        for i in range(self.c.num_layers):
            p = f"blocks.{i}."
            s1, c1, g1, s2, c2, g2 = (self.w[p + "modulation"].unsqueeze(1) + e6).unbind(2)
            y = self.layer_norm(x) * (1 + c1) + s1
            q = self.heads(self.rms(self.linear(y, p + "self_attn.q"), p + "self_attn.norm_q"))
            k = self.heads(self.rms(self.linear(y, p + "self_attn.k"), p + "self_attn.norm_k"))
            v = self.heads(self.linear(y, p + "self_attn.v"))
            x = x + g1 * self.linear(attend(i, q, k, v), p + "self_attn.o")
            y = self.layer_norm(x) * self.w[p + "norm3.weight"] + self.w[p + "norm3.bias"]
            q = self.heads(self.rms(self.linear(y, p + "cross_attn.q"), p + "cross_attn.norm_q"))
            k = self.heads(self.rms(self.linear(text, p + "cross_attn.k"), p + "cross_attn.norm_k"))
            v = self.heads(self.linear(text, p + "cross_attn.v"))
            x = x + self.linear(self.softmax_attention(q, k, v), p + "cross_attn.o")
            y = self.layer_norm(x) * (1 + c2) + s2
            y = F.gelu(self.linear(y, p + "ffn.0"), approximate="tanh")
            x = x + g2 * self.linear(y, p + "ffn.2")
        s, c = (self.w["head.modulation"].unsqueeze(1) + e.unsqueeze(2)).repeat_interleave(n, 1).unbind(2)
        x = self.linear(self.layer_norm(x) * (1 + c) + s, "head.head")
        x = x.reshape(b, f, h // 2, w // 2, 2, 2, self.c.out_channels)
        return torch.einsum("bfhwpqc->bcfhpwq", x).reshape(b, -1, f, h, w)

    def masked(self, latents, t, embeddings, mask, positions=None):
        """All frames in one attention; mask [F, F] is added between frames."""
        grid = latents.shape[3] // 2, latents.shape[4] // 2
        n = grid[0] * grid[1]
        full = mask.double().repeat_interleave(n, 0).repeat_interleave(n, 1)
        positions = range(latents.shape[2]) if positions is None else positions

        def attend(_, q, k, v):
            return self.softmax_attention(
                self.rope(q, positions, grid), self.rope(k, positions, grid), v, full
            )

        return self.forward(latents, t, embeddings, attend)


class History:
    """Keys and values of every frame that was ever committed, un-rotated; a chunk picks what it may see."""

    def __init__(self, oracle, grid, capacity, sink):
        self.o, self.grid, self.capacity, self.sink = oracle, grid, capacity, sink
        self.frames = [[] for _ in range(oracle.c.num_layers)]  # per layer: (k, v) a frame

    def visible(self, layer):
        past = self.frames[layer]
        rest = past[self.sink :]
        return past[: self.sink] + rest[max(0, len(past) - self.capacity) :]

    def run(self, latents, t, embeddings, *, bias=0.0, commit=False):
        n = self.grid[0] * self.grid[1]
        added = []

        def attend(layer, q, k, v):
            seen = self.visible(layer)
            places = range(len(seen), len(seen) + latents.shape[2])
            keys = torch.cat([f[0] for f in seen] + [k], 1)
            values = torch.cat([f[1] for f in seen] + [v], 1)
            mask = torch.zeros(keys.shape[1], dtype=torch.float64)
            mask[n : len(seen) * n] = bias
            keys = self.o.rope(keys, range(places.stop), self.grid)
            added.append(list(zip(k.split(n, 1), v.split(n, 1), strict=True)))
            return self.o.softmax_attention(self.o.rope(q, places, self.grid), keys, values, mask)

        out = self.o.forward(latents, t, embeddings, attend)
        if commit:
            for layer, new in zip(self.frames, added, strict=True):
                layer.extend(new)
        return out


def block_mask(context, chunk, log_bias=0.0):
    """Context sees context; the chunk sees all, context frames after the first with the bias."""
    mask = torch.zeros(context + chunk, context + chunk)
    mask[:context, context:] = -torch.inf
    mask[context:, 1:context] = log_bias
    return mask


def assert_close(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Stream:
    """Random latents, times and text of a small video."""

    def __init__(self, batch=1, grid=(2, 3), seed=5):
        self.size = (batch, 16), (2 * grid[0], 2 * grid[1])
        self.text = draw((batch, 5, 20), seed)
        self.batch, self.seed = batch, seed

    def latents(self, frames, seed):
        return draw((*self.size[0], frames, *self.size[1]), self.seed + seed)

    def times(self, frames, seed):
        return torch.rand(self.batch, frames, generator=torch.Generator().manual_seed(seed)) * 1000


@pytest.mark.parametrize("window", [1, 3, 4, 6, 12])
@pytest.mark.parametrize("bias", [None, 0.3])
def test_recompute_equals_masked_oracle(make_transformer, make_cache, window, bias):
    model, stream = make_transformer(), Stream()
    oracle, text = Oracle(model), model.embed_text(stream.text)
    cache = make_cache(model, frames=window)
    log_bias = None if bias is None else torch.tensor(bias).log()
    for chunk in range(4):
        n = min(3 * chunk, window)
        context, context_t = stream.latents(n, chunk), torch.zeros(1, n)
        latents, t = stream.latents(3, 100 + chunk), stream.times(3, chunk)
        if n:
            assert model(context, context_t, text, cache, pass_=Pass.CONTEXT) is None
        assert cache.context_frames == n
        mask = block_mask(n, 3, 0.0 if bias is None else math.log(bias))
        expected = oracle.masked(
            torch.cat([context, latents], 2), torch.cat([context_t, t], 1), stream.text, mask
        )[:, :, n:]
        for _ in range(2):  # the context must survive a denoising pass
            got = model(latents, t, text, cache, pass_=Pass.DENOISE, bias=log_bias)
            assert_close(got, expected)
        trained = model.forward_train(context if n else None, context_t, latents, t, text, log_bias)
        assert_close(trained, expected)


def test_denoise_without_context_is_full_attention(make_transformer, make_cache):
    model, stream = make_transformer(num_layers=3, num_heads=3, dim=54), Stream(grid=(3, 2))
    latents, t = stream.latents(5, 0), stream.times(5, 1)
    got = model(
        latents,
        t,
        model.embed_text(stream.text),
        make_cache(model, chunk=5, grid=(3, 2)),
        pass_=Pass.DENOISE,
    )
    assert_close(got, Oracle(model).masked(latents, t, stream.text, torch.zeros(5, 5)))


def test_context_times_need_not_be_zero(make_transformer, make_cache):
    model, stream = make_transformer(), Stream()
    text, cache = model.embed_text(stream.text), make_cache(model)
    context, latents = stream.latents(3, 0), stream.latents(3, 1)
    context_t, t = stream.times(3, 2), stream.times(3, 3)
    model(context, context_t, text, cache, pass_=Pass.CONTEXT)
    got = model(latents, t, text, cache, pass_=Pass.DENOISE)
    both = torch.cat([context, latents], 2), torch.cat([context_t, t], 1)
    assert_close(got, Oracle(model).masked(*both, stream.text, block_mask(3, 3))[:, :, 3:])


@pytest.mark.parametrize("window", [1, 3, 4, 6])
def test_rolling_equals_one_attention_over_the_whole_video(make_transformer, make_cache, window):
    """RoPE is relative, so bounded positions must give what the video's own frame numbers give."""
    model, stream, chunks = make_transformer(), Stream(), 5
    text = model.embed_text(stream.text)
    cache = make_cache(model, CachePolicy.ROLLING, frames=window)
    video, zero = stream.latents(3 * chunks, 7), torch.zeros(1, 3)
    mask = torch.full((3 * chunks, 3 * chunks), -torch.inf)
    for i in range(0, 3 * chunks, 3):
        mask[i : i + 3, max(0, i - window) : i + 3] = 0
    expected = Oracle(model).masked(video, torch.zeros(1, 3 * chunks), stream.text, mask)
    for i in range(0, 3 * chunks, 3):
        clean = video[:, :, i : i + 3]
        assert_close(model(clean, zero, text, cache, pass_=Pass.DENOISE), expected[:, :, i : i + 3])
        assert model(clean, zero, text, cache, pass_=Pass.COMMIT) is None


@pytest.mark.parametrize(
    ("policy", "window", "sink"),
    [
        (CachePolicy.ROLLING, 6, 0),
        (CachePolicy.ROLLING, 2, 0),
        (CachePolicy.SINK, 6, 3),
        (CachePolicy.SINK, 5, 1),
        (CachePolicy.SINK, 4, 3),
        (CachePolicy.SINK, 2, 2),
    ],
)
@pytest.mark.parametrize("bias", [None, 0.3])
def test_rolling_and_sink_equal_history_oracle(make_transformer, make_cache, policy, window, sink, bias):
    model, stream = make_transformer(), Stream()
    text = model.embed_text(stream.text)
    cache = make_cache(model, policy, frames=window, sink=sink)
    history = History(Oracle(model), (2, 3), window, sink)
    log_bias = None if bias is None else torch.tensor(bias).log()
    for chunk in range(5):
        assert cache.context_frames == min(3 * chunk, window)
        for step in range(2):
            latents, t = stream.latents(3, 10 * chunk + step), stream.times(3, 10 * chunk + step)
            expected = history.run(latents, t, stream.text, bias=math.log(bias or 1.0))
            assert_close(model(latents, t, text, cache, pass_=Pass.DENOISE, bias=log_bias), expected)
        clean, zero = stream.latents(3, 500 + chunk), torch.zeros(1, 3)
        history.run(clean, zero, stream.text, bias=math.log(bias or 1.0), commit=True)
        model(clean, zero, text, cache, pass_=Pass.COMMIT, bias=log_bias)


def test_batch_entries_do_not_meet(make_transformer, make_cache):
    model, both = make_transformer(), Stream(batch=2)
    context, latents = both.latents(3, 0), both.latents(3, 1)
    times, log_bias = both.times(3, 2), torch.tensor(0.4).log()

    def run(rows):
        text, cache = model.embed_text(both.text[rows]), make_cache(model, batch=len(both.text[rows]))
        model(context[rows], torch.zeros(len(context[rows]), 3), text, cache, pass_=Pass.CONTEXT)
        return model(latents[rows], times[rows], text, cache, pass_=Pass.DENOISE, bias=log_bias)

    alone = torch.cat([run(slice(0, 1)), run(slice(1, 2))])
    assert_close(run(slice(0, 2)), alone.double(), 1e-5)


@pytest.mark.parametrize("backend", [AttentionBackend.SDPA, AttentionBackend.MATH])
def test_bias_backends_agree_with_the_oracle(make_transformer, make_cache, backend):
    model, stream = make_transformer(), Stream()
    model.attention = backend
    text, cache = model.embed_text(stream.text), make_cache(model, frames=4)
    context, latents, t = stream.latents(4, 0), stream.latents(3, 1), stream.times(3, 2)
    model(context, torch.zeros(1, 4), text, cache, pass_=Pass.CONTEXT)
    got = model(latents, t, text, cache, pass_=Pass.DENOISE, bias=torch.tensor(0.3).log())
    both = torch.cat([context, latents], 2), torch.cat([torch.zeros(1, 4), t], 1)
    mask = block_mask(4, 3, math.log(0.3))
    assert_close(got, Oracle(model).masked(*both, stream.text, mask)[:, :, 4:])


def test_forward_train_reaches_every_parameter(make_transformer):
    model, stream = make_transformer().requires_grad_(True), Stream()
    velocity = model.forward_train(
        stream.latents(3, 0),
        torch.zeros(1, 3),
        stream.latents(3, 1),
        stream.times(3, 2),
        model.embed_text(stream.text),
        torch.tensor(0.5).log(),
    )
    velocity.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_another_prompt_at_the_same_addresses(make_transformer):
    model = make_transformer()
    a = model.embed_text(Stream(seed=1).text)
    other = torch.cat((Stream(seed=2).text, torch.ones(1, 2, 20)), dim=1)
    b = model.embed_text(other)

    def tensors(text):
        return text.keys + text.values + (text.span.count, text.span.last_bias)

    addresses = [x.data_ptr() for x in tensors(a)]
    model.embed_text_into(a, other)
    assert [x.data_ptr() for x in tensors(a)] == addresses
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 5, 11, 12])
def test_one_key_stands_for_all_padding(make_transformer, make_cache, tokens):
    """A prompt's own keys and one more give what all `text_len` keys give, and what the oracle gives."""
    model = make_transformer(dim=96, num_heads=3, text_len=12)
    stream, embeddings = Stream(batch=2), draw((2, 12, 20), 7)
    embeddings[0, tokens:] = 0  # beside a full prompt
    text = model.embed_text(embeddings)
    assert text.span.count.tolist() == [min(tokens + 1, 12), 12]
    stands_for = torch.tensor([max(12 - tokens, 1), 1])
    torch.testing.assert_close(text.span.last_bias.exp(), stands_for.float())

    def velocity(backend):
        model.attention = backend
        latents, times = stream.latents(3, 1), stream.times(3, 2)
        return model(latents, times, text, make_cache(model, batch=2), pass_=Pass.DENOISE)

    expected = Oracle(model).masked(stream.latents(3, 1), stream.times(3, 2), embeddings, torch.zeros(3, 3))
    short, padded = velocity(AttentionBackend.TRITON), velocity(AttentionBackend.SDPA)
    assert_close(short, expected)
    assert_close(short, padded.double(), 1e-5)


def test_unused_slots_are_never_attended(make_transformer, make_cache):
    model, stream = make_transformer(), Stream()
    text, cache = model.embed_text(stream.text), make_cache(model, frames=6)
    for layer in cache.layers:
        layer.key.fill_(torch.nan)
        layer.value.fill_(torch.nan)
    model(stream.latents(3, 0), torch.zeros(1, 3), text, cache, pass_=Pass.CONTEXT)
    got = model(stream.latents(2, 1), stream.times(2, 2), text, cache, pass_=Pass.DENOISE)
    assert got.isfinite().all()


def test_low_precision_stays_close(make_transformer, make_cache):
    """bf16 and fp16 weights: norms, modulation and rotary numbers stay fp32, so errors stay small."""
    stream = Stream()
    context, latents, t = stream.latents(3, 0), stream.latents(3, 1), stream.times(3, 2)

    def run(dtype):
        model = make_transformer().to(dtype)
        text, cache = model.embed_text(stream.text), make_cache(model, dtype=dtype)
        model(context, torch.zeros(1, 3), text, cache, pass_=Pass.CONTEXT)
        return model(latents, t, text, cache, pass_=Pass.DENOISE)

    exact = run(torch.float32).double()
    for dtype, tolerance in ((torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
        assert run(dtype).dtype == latents.dtype
        assert_close(run(dtype), exact, tolerance)


def test_wrong_shapes_are_refused(make_transformer, make_cache):
    model, stream = make_transformer(), Stream()
    text, cache = model.embed_text(stream.text), make_cache(model)
    latents, t = stream.latents(3, 0), torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"got latents \(1, 16, 3, 4, 8\).*expected \(1, 16, 3, 4, 6\)"):
        model(draw((1, 16, 3, 4, 8), 0), t, text, cache, pass_=Pass.DENOISE)
    with pytest.raises(ValueError, match=r"timesteps \(1, 2\).*\(1, 3\)"):
        model(latents, t[:, :2], text, cache, pass_=Pass.DENOISE)
    with pytest.raises(ValueError, match="bias of shape"):
        model(latents, t, text, cache, pass_=Pass.CONTEXT, bias=torch.tensor(-1.0))
    with pytest.raises(ValueError, match="text embeddings: got shape"):
        model.embed_text(torch.zeros(1, 8, 20))
    with pytest.raises(ValueError, match="even dim/num_heads"):
        TransformerConfig(dim=10, ffn_dim=8, num_layers=1, num_heads=4)


def test_paths_say_what_runs_and_why(make_transformer):
    model = make_transformer()
    assert model.paths() == (
        "transformer: attention by sdpa (chosen for cpu, float32, heads of 20), KV bias by an additive mask, "
        "to the prompt by sdpa (all of its padding); plain PyTorch between products"
    )
    model.attention = AttentionBackend.MATH
    assert "attention by math (forced" in model.paths()
    model.attention = AttentionBackend.TRITON
    assert "KV bias by the same call, to the prompt by triton (one key for its padding)" in model.paths()


def test_model_holds_no_stream_state(make_transformer, make_cache):
    """Two streams interleaved over one set of weights give what each gives alone."""
    model = make_transformer()

    def passes(stream: Stream, cache: KVCache, model: WanTransformer = model):
        text = model.embed_text(stream.text)
        for chunk in range(3):
            if chunk:
                model(stream.latents(3, chunk), torch.zeros(1, 3), text, cache, pass_=Pass.CONTEXT)
            yield model(stream.latents(3, 50), stream.times(3, chunk), text, cache, pass_=Pass.DENOISE)

    a, b = (Stream(seed=s) for s in (1, 2))
    alone = [list(passes(s, make_cache(model))) for s in (a, b)]
    mixed = zip(passes(a, make_cache(model)), passes(b, make_cache(model)), strict=True)
    for i, (x, y) in enumerate(mixed):
        assert torch.equal(x, alone[0][i])
        assert torch.equal(y, alone[1][i])
