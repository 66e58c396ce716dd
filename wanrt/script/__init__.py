"""prompt.toml and presets: schema, timeline, and what each chunk is conditioned on."""

from wanrt.script.build import Script, build_job, read_script
from wanrt.script.job import RenderJob
from wanrt.script.preset import Preset, demo_names, load_preset, preset_names
from wanrt.script.timeline import Conditioning, Curve, Scene, Timeline, chunk_frames, chunks_for, first_frame

__all__ = [
    "Conditioning",
    "Curve",
    "Preset",
    "RenderJob",
    "Scene",
    "Script",
    "Timeline",
    "build_job",
    "chunk_frames",
    "chunks_for",
    "demo_names",
    "first_frame",
    "load_preset",
    "preset_names",
    "read_script",
]
