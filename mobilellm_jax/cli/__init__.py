"""The command line: each command has its own file, which `main.py` imports.

Only `flags.py` in this folder uses absl. Each command defines its flags in its own dataclass
`Flags`, so two commands may use the same name for a flag. `main(flags)` runs the command. If a
command has the flag `--config`, `main` also gets the overrides `--config.a.b=value` (see
`config_flags`).
"""
