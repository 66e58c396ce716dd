"""The chunk loop: stage 0, mesh, envelopes, anchor policies, noise, schedule.

`render(job, observer)` makes a file. Underneath, `build_pipeline` joins a `PromptBook` and a `PixelStage` (stage 0)
with a `MeshHandle` (the transformer, wherever it runs) into a `Pipeline`, whose `run()` gives frames.
"""

from wanrt.pipeline.context import AnchorPolicy
from wanrt.pipeline.render import RenderResult, render

__all__ = ["AnchorPolicy", "RenderResult", "render"]
