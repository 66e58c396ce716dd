"""wanrt: live video from prompts with causal Wan2.1 models, on one to eight GPUs."""

__version__ = "0.1.0"  # pyproject.toml reads it here: asking the installed package costs a tenth of a second
