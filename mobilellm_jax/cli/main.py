"""Runs `mobilellm COMMAND --flags`: finds the command and parses its flags.

Exit codes:
  0    The command is done.
  1    The command failed while it ran, and a traceback shows where.
  2    The input is wrong, and one message says how to correct it.
  75   The run is saved, and the same command resumes it.
  130  Ctrl-C interrupted the command.
  141  The program that reads the output, such as `head`, has ended.
"""

import importlib
import inspect
import io
import keyword
import select
import sys
from types import ModuleType

from mobilellm_jax import __version__
from mobilellm_jax.cli.errors import UsageError, is_bad_input, message
from mobilellm_jax.cli.flags import parse, usage
from mobilellm_jax.config import near_miss
from mobilellm_jax.startup.messages import discard, open_closed_streams, show_messages

BAD_INPUT = 2
INTERRUPTED = 130
READER_GONE = 141  # A shell reports this code for a program that SIGPIPE killed.

COMMANDS = {
    "prepare": "turn text into token shards; the tokenizer is given or trained",
    "inspect": "check token shards, count their contents, show some of the text",
    "plan": "predict the memory, communication and time of a run, without a TPU",
    "train": "train from a config; the same command resumes",
    "evaluate": "score tasks, or measure the perplexity of a text",
    "generate": "continue prompts, or answer line by line",
    "import": "turn a Hugging Face directory into a run folder",
    "export": "write a checkpoint in a format that other programs read, also on phones",
    "benchmark": "measure exports in their own runtimes: size, speed, memory, loss",
    "sweep": "train many models to compare: the paper's grids, or your own values",
    "report": "turn runs into one page: curves, and the paper's tables next to our numbers",
}

_HELP = {"-h", "-help", "--help"}


def run() -> int:
    """Runs the command in `sys.argv`; the console script `mobilellm` calls this function."""
    open_closed_streams()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()  # Raises write errors before the process exits.
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # The error came from another pipe or socket.
        return READER_GONE
    finally:
        _forget_unwritten_messages()


def _forget_unwritten_messages() -> None:
    """Prevents exit code 120, which Python returns if it cannot flush standard error at exit."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        discard(2)


def _reader_is_gone() -> bool:
    """Returns whether the program that reads our output, such as `| head`, has ended.

    If the reader has ended, the function redirects our output to /dev/null. Otherwise the flush at
    the exit of our process would fail again.
    """
    outputs = select.poll()
    outputs.register(1, 0)
    outputs.register(2, 0)
    gone = [
        output for output, event in outputs.poll(0) if event & (select.POLLERR | select.POLLHUP)
    ]
    for output in gone:
        discard(output)
    return bool(gone)


def main(args: list[str]) -> int:
    """Runs one command and returns its exit code; an error that is a bug is raised."""
    _print_any_character()
    show_messages()
    name = ""
    try:
        if not args or args[0] in _HELP or args == ["help"]:
            print(_overview())
            return 0
        if args[0] == "--version":
            import importlib.metadata  # The import takes longer than the rest of `--version`.

            jax = importlib.metadata.version("jax")
            print(f"mobilellm-jax {__version__} (jax {jax})")
            return 0
        name, *rest = [*args[1:], "--help"] if args[0] == "help" else args
        return _run(name, rest)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if not is_bad_input(error):
            raise
        lines = message(error).splitlines()
        start = "\n  " if len(lines) > 1 else " "
        print(f"mobilellm {name}:{start}" + "\n  ".join(lines), file=sys.stderr)
        return BAD_INPUT


def _print_any_character() -> None:
    r"""Makes standard output print a character that its encoding lacks as an escape such as \u65e5.

    Texts of users and models may have any character, and latin-1 or ASCII can print few of them.
    Python already does the same for standard error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def import_command(name: str) -> ModuleType:
    """Returns the module of a command, or raises a UsageError if there is no such command."""
    if name not in COMMANDS:
        kind = "flag before the command" if name.startswith("-") else "command"
        raise UsageError(
            f"unknown {kind} {name}.{near_miss(name, COMMANDS)} "
            f"The commands are {', '.join(COMMANDS)}."
        )
    file = f"{name}_" if keyword.iskeyword(name) else name
    return importlib.import_module(f"mobilellm_jax.cli.{file}")


def _run(name: str, args: list[str]) -> int:
    command = import_command(name)
    if _asks_for_help(args):
        heading = f"Usage: mobilellm {name} --flag=value ...\n\n{inspect.getdoc(command)}\n\n"
        print(heading + usage(command.Flags))
        return 0
    values, overrides = parse(name, command.Flags, args)
    if hasattr(values, "config"):
        return command.main(values, overrides) or 0
    return command.main(values) or 0


def _asks_for_help(args: list[str]) -> bool:
    before_separator = args[: args.index("--")] if "--" in args else args
    return not _HELP.isdisjoint(before_separator)


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "Usage: mobilellm COMMAND --flag=value ...",
            "",
            *(f"  {name:<{width}}{line}" for name, line in COMMANDS.items()),
            "",
            "mobilellm COMMAND --help shows examples and all flags of a command.",
            "mobilellm --version shows the version.",
        ]
    )
