"""Presets of models, hardware and demo prompts, as TOML."""
