"""The settings of a run, and the TOML they are written in."""
