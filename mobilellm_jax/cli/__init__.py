"""The command line: one thin file per command, and `main.py`, which imports the one asked for.

Only this folder knows absl. A command defines its flags at module level and `main(argv)`, where
`argv[1:]` holds the `--config.a.b=value` overrides (see `config_flags`) and is otherwise empty.
"""
