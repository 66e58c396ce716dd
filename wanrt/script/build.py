"""From a prompt file and flags to a `RenderJob`, or to one error that lists everything that is wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from wanrt.errors import ScriptError, UsageError
from wanrt.parallel.topology import ModelShape, Topology, check
from wanrt.script import findings as say
from wanrt.script import units
from wanrt.script.findings import Finding
from wanrt.script.job import RenderJob
from wanrt.script.layout import Layout, lay_out, unseen
from wanrt.script.preset import CacheKind, Preset, bundled, demo_names, is_model, load_preset, read_preset
from wanrt.script.schema import Flags, PromptFile, SceneTable
from wanrt.script.source import MAX_BYTES, Source, parse
from wanrt.script.source import Path as KeyPath
from wanrt.script.timeline import Curve, Scene, Timeline

DEFAULT_PRESET = "wan-tiny"
MAX_WINDOW = 12  # latent frames of a recomputed context (issue of the design: windows 1 to 12)

PLACEHOLDER = PromptFile.model_validate({"scene": [{"prompt": "?"}]})  # frozen

log = logging.getLogger("wanrt.script")


@dataclass(frozen=True)
class Script:
    """A prompt file, parsed but not checked, or a bare prompt. `stem` names the output by default."""

    source: Source
    stem: str = "wanrt"
    bare: bool = False


def build_job(script: Script, flags: Mapping[str, Any] | None = None) -> RenderJob:
    """The job that `script` describes, with the `flags` that are not None winning over it.

    `flags` has the keys of `Flags`, with values as typed. Raises ScriptError, one line per finding.
    """
    given, found_in_flags = _flags(flags or {})
    file, found_in_file = _file(script)
    return _Resolver(script, file, given, [*found_in_flags, *found_in_file]).job()


def read_script(argument: str, stdin: BinaryIO | None = None) -> Script:
    """What `wanrt render ARGUMENT` names: "-" (stdin), a file, a bundled demo, or else a prompt.

    Raises UsageError for a file that cannot be read, ScriptError for one that is not TOML.
    """
    if argument == "-":
        if stdin is None:
            raise UsageError('got "-" but no standard input: give a file or a prompt')
        return Script(parse(stdin.read(MAX_BYTES + 1), "<stdin>"))
    path = Path(argument)
    if not _looks_like_file(argument, path):
        return _demo(argument) or _bare(argument)
    try:
        with path.open("rb") as file:
            return Script(parse(file.read(MAX_BYTES + 1), argument), path.stem)
    except FileNotFoundError:
        by_name = path.suffix == ".toml" and path.parent.name in ("", "presets")
        if by_name and (found := _demo(path.stem)) is not None:
            log.info("%s is not here: using the demo of that name that comes with wanrt", argument)
            return found
        raise UsageError(_no_file(argument, path)) from None
    except (OSError, ValueError) as bad:
        reason = getattr(bad, "strerror", None) or bad
        raise UsageError(f"{units.show(argument)} cannot be read: {reason}") from None


def _looks_like_file(argument: str, path: Path) -> bool:
    """Whether `argument` names a file rather than says what to show: `story.tml` and `/dev/fd/63` do, `sunset` does not
    unless there is such a file.
    """
    if argument.endswith(".toml"):
        return True
    if len(argument.split()) != 1:
        return False
    try:
        return path.is_file() or _is_path(argument, path)
    except (OSError, ValueError):  # a prompt of 10,000 characters is no file name
        return False


def _is_path(argument: str, path: Path) -> bool:
    """Whether one word can only be a path: with an extension, or with a slash or as `.` to something that exists."""
    if re.fullmatch(r"[^/]*[\w-]\.[A-Za-z]\w{1,4}", argument):
        return True
    return ("/" in argument or argument in (".", "..")) and path.exists()


def _no_file(argument: str, path: Path) -> str:
    close = units.nearest(path.stem, demo_names())
    hint = f"did you mean {close}?" if close else ", ".join(demo_names())
    return (
        f"{units.show(argument)} does not exist: give a prompt file, a prompt in quotes, or a demo ({hint})"
    )


def _demo(name: str) -> Script | None:
    """The bundled prompt file called `name`."""
    inside = bundled(name)
    if inside is None:
        return None
    source = parse(inside.read_bytes(), f"presets/{name}.toml")
    return Script(source, name) if not is_model(source) else None


def _bare(prompt: str) -> Script:
    if not prompt.strip():
        raise UsageError("got an empty prompt: say what to show, or give a prompt file")
    return Script(Source("the prompt", {"scene": [{"prompt": prompt}]}, {}), bare=True)


def _flags(values: Mapping[str, Any]) -> tuple[Flags, list[Finding]]:
    """The checked flags; without the wrong ones when there are any."""
    given = {key: value for key, value in values.items() if value is not None}
    try:
        return Flags.model_validate(given), []
    except ValidationError as bad:
        broken = say.broken_keys(bad) or {"duration", "chunks"}
        rest = {key: value for key, value in given.items() if key not in broken}
        return Flags.model_validate(rest), say.in_flags(bad, Flags)


def _file(script: Script) -> tuple[PromptFile, list[Finding]]:
    """The checked file; when something is wrong with it, what is right about its settings.

    A file that is no prompt file at all is one finding, not twenty.
    """
    source = script.source
    if is_model(source):
        name = source.data.get("name", "NAME")
        text = f'is a model preset, not a prompt file: wanrt render --preset {name} "PROMPT" -o out.mp4'
        return PLACEHOLDER, [(1, text)]
    try:
        return PromptFile.model_validate(source.data), []
    except ValidationError as bad:
        found = say.in_file(bad, source, PromptFile)
        if script.bare:  # a prompt has no lines
            found = [(0, text) for _, text in found]
        return _survivors(source, say.broken_keys(bad)), found


def _survivors(source: Source, broken: set[str]) -> PromptFile:
    """The settings of a file that are not `broken`, with a scene that stands for its scenes."""
    dropped = broken | {"scene", "duration", "chunks"}
    settings = {key: value for key, value in source.data.items() if key not in dropped}
    return PromptFile.model_validate({**settings, "scene": [{"prompt": "?"}]})


class _Resolver:
    """Merges file, flags and preset into a job, and adds the findings that need more than one of them."""

    def __init__(self, script: Script, file: PromptFile, flags: Flags, findings: list[Finding]) -> None:
        self.script, self.file, self.flags, self.findings = script, file, flags, findings
        self.notes: list[str] = []

    def job(self) -> RenderJob:
        """The job. Raises ScriptError with every finding."""
        whole = not self.findings  # scenes are only laid out when every number is right
        preset = self._preset()
        if preset is not None:
            self._check_model(preset)
            self._check_topology(preset)
        if preset is None or not whole:
            raise self._refusal()
        fps: Fraction = self._pick("fps") or preset.video.fps
        layout = lay_out(self.file, self.flags, fps)
        for path, text in layout.findings:
            self._find(path, text)
        if self.findings:
            raise self._refusal()
        return self._assemble(preset, fps, layout)

    def _refusal(self) -> ScriptError:
        return ScriptError(say.report(self.findings, self.script.source.name))

    def _assemble(self, preset: Preset, fps: Fraction, layout: Layout) -> RenderJob:
        width, height = self._pick("size") or preset.video.sizes[0]
        self._note_size(preset, (width, height))
        flags = self.flags
        return RenderJob(
            preset=preset,
            timeline=self._timeline(preset, layout),
            seed=self._pick("seed", 0),
            width=width,
            height=height,
            fps=fps,
            frames=layout.frames,
            steps=steps_of(preset, self._pick("steps")) or preset.steps,
            window=self._pick("window", preset.cache.window),
            bias=self._pick("bias", preset.cache.bias),
            anchor=self._pick("anchor", preset.video.anchor),
            topology=flags.topology,
            precision=flags.precision,
            attention=flags.attention,
            device=flags.device,
            weights=_path(flags.weights),
            random_weights=flags.random_weights,
            output=_path(flags.output) or Path(f"{self.script.stem}.mp4"),
            codec=self._pick("codec"),
            quality=self._pick("quality"),
            force=flags.force,
            stats=_path(flags.stats),
            trace=_path(flags.trace),
            title=self.file.title or "",
            notes=tuple(self.notes),
        )

    def _pick(self, key: str, default: Any = None) -> Any:
        """The flag's value, else the file's, else `default`."""
        for value in (getattr(self.flags, key), getattr(self.file, key)):
            if value is not None:
                return value
        return default

    def _find(self, path: KeyPath, text: str) -> None:
        self.findings.append((0 if self.script.bare else self.script.source.line(path), text))

    def _preset(self) -> Preset | None:
        """The preset; None when it is wrong, which is then a finding."""
        name = self._pick("preset", DEFAULT_PRESET)
        try:
            return load_preset(name)
        except UsageError as bad:
            at = 0 if self.flags.preset is not None else self.script.source.line(("preset",))
            self.findings += [(at, line) for line in str(bad).splitlines()]
            return None

    def _check_model(self, preset: Preset) -> None:
        """Refuse what the preset's model cannot do."""
        recompute = preset.cache.policy is CacheKind.RECOMPUTE
        if not recompute:
            kept = f"{preset.name} keeps a {preset.cache.policy} cache"
            self._refuse("anchor", f"{kept} and has no anchor: leave it out")
            self._refuse("bias", f"{kept} and takes no KV attention bias: leave it out")
        window = self._pick("window")
        low = preset.cache.sink + 1
        high = MAX_WINDOW if recompute else preset.cache.window
        if window is not None and not low <= window <= high:
            self._refuse("window", f"got {window}; expected {low} to {high} latent frames for {preset.name}")

    def _check_topology(self, preset: Preset) -> None:
        """Refuse a topology whose divisions do not come out even; how many devices there are is asked later."""
        if self.flags.topology == "auto":
            return
        width, height = self._pick("size") or preset.video.sizes[0]
        shape = ModelShape(
            preset.transformer.num_heads,
            preset.transformer.ffn_dim,
            (height // 16) * (width // 16),
            max(height, width) // 8,
        )
        try:
            check(Topology.parse(self.flags.topology), shape)
        except UsageError as bad:
            self.findings.append((0, f"--{bad}"))

    def _refuse(self, key: str, text: str) -> None:
        """Note `text` wherever `key` is set: as a flag, in the file, in scenes."""
        if getattr(self.flags, key) is not None:
            self.findings.append((0, f"{say.flag(key)}: {text}"))
        elif getattr(self.file, key, None) is not None:
            self._find((key,), f"{key}: {text}")
        for i, scene in enumerate(self.file.scene):
            if getattr(scene, key, None) is not None:
                self._find(("scene", i, key), f"scene {i + 1}, {key}: {text}")

    def _note_size(self, preset: Preset, size: tuple[int, int]) -> None:
        if size not in preset.video.sizes:
            made_for = " or ".join(f"{w}x{h}" for w, h in preset.video.sizes)
            self.notes.append(f"{preset.name} was made for {made_for}; {size[0]}x{size[1]} may look worse")

    def _timeline(self, preset: Preset, layout: Layout) -> Timeline:
        late = unseen(layout)
        for i in late:
            start, end = layout.seconds(layout.starts[i]), layout.seconds(layout.frames)
            self.notes.append(f"scene {i + 1} is not shown: it starts at {start}, the video ends at {end}")
        scenes = enumerate(self.file.scene)
        return Timeline(tuple(self._scene(preset, layout, i, s) for i, s in scenes if i not in late))

    def _scene(self, preset: Preset, layout: Layout, i: int, table: SceneTable) -> Scene:
        transition = table.transition
        # A flag wins over the whole file, its scenes included.
        return Scene(
            prompts=table.prompt,
            start_frame=layout.starts[i],
            start_chunk=layout.chunks[i],
            ramp=transition.over * layout.fps if transition else Fraction(0),
            curve=transition.curve if transition else Curve.LERP,
            bias=table.bias if self.flags.bias is None else None,
            steps=steps_of(preset, table.steps) if self.flags.steps is None else None,
        )


def steps_of(preset: Preset, value: int | tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Timesteps of a `steps` value: a list as it is; a count as even steps, or as the preset's own list when
    that has as many.
    """
    if isinstance(value, int):
        return preset.steps if value == len(preset.steps) else preset.sampling.evenly(value)
    return value


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


__all__ = ["Script", "build_job", "read_preset", "read_script", "steps_of"]
