"""prompt.toml and presets: schema, timeline, and what each chunk is conditioned on."""
