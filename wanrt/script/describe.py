"""Presets in words, for `wanrt presets`."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from wanrt.script.preset import Preset, bundled, demo_names, load_preset, preset_names
from wanrt.script.source import parse


def listing(*, as_json: bool = False) -> str:
    """All bundled models and demos, a line each."""
    models = {name: load_preset(name).title for name in preset_names()}
    demos = {name: demo_title(name) for name in demo_names()}
    if as_json:
        return json.dumps({"models": models, "demos": demos}, indent=2)
    width = max(map(len, (*models, *demos)))
    lines = ["Models (wanrt presets NAME; wanrt render --preset NAME):"]
    lines += [f"  {name:<{width}}  {title}" for name, title in models.items()]
    lines += ["", "Demos (wanrt render NAME -o out.mp4):"]
    lines += [f"  {name:<{width}}  {title}" for name, title in demos.items()]
    return "\n".join(lines)


def demo_title(name: str) -> str:
    """The title of a bundled demo, with the model that it is for."""
    inside = bundled(name)
    data = parse(inside.read_bytes(), name).data if inside is not None else {}
    return f"{data.get('title', '')} ({data.get('preset', 'wan-tiny')})"


def describe(name: str, *, as_json: bool = False) -> str:
    """One model preset, with all its numbers. Raises UsageError or ScriptError as `load_preset` does."""
    preset = load_preset(name)
    if as_json:
        return json.dumps(preset.model_dump(mode="json"), indent=2)
    rows = _rows(preset)
    width = max(len(key) for key, _ in rows)
    lines = [f"{preset.name}: {preset.title}", *textwrap.wrap(preset.about, 100), ""]
    return "\n".join(lines + [f"{key:<{width}}  {value}" for key, value in rows])


def _rows(preset: Preset) -> list[tuple[str, Any]]:
    shape, cache, text = preset.transformer, preset.cache, preset.text
    heads = f"{shape.num_heads} heads of {shape.dim // shape.num_heads}"
    kept = f"{cache.policy}, {cache.window} latent frames" + (f", sink of {cache.sink}" if cache.sink else "")
    return [
        ("transformer", f"dim {shape.dim}, ffn {shape.ffn_dim}, {shape.num_layers} layers, {heads}"),
        (
            "text",
            f"dim {text.dim}, {text.num_layers} layers, {text.vocab} words; {shape.text_len} tokens read",
        ),
        ("vae", f"{preset.vae.kind}, base dim {preset.vae.base_dim}"),
        ("cache", kept),
        ("bias", f"{cache.bias:g}" + (" (off)" if cache.bias == 1 else "")),
        ("steps", ", ".join(f"{t:.4g}" for t in preset.steps)),
        ("chunk", f"{preset.chunk} latent frames, 12 pixel frames (the first: 9)"),
        ("sizes", ", ".join(f"{w}x{h}" for w, h in preset.video.sizes)),
        ("fps", f"{float(preset.video.fps):g}"),
        ("weights", "inside wanrt" if preset.weights.embedded else ", ".join(preset.weights.transformer)),
    ]
