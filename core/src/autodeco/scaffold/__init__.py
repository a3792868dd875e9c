"""What ``autodeco plugin new`` writes: a plugin's package, begun from a model's ``config.json``."""
