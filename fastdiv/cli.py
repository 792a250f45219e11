"""``fastdiv``: train, bench, check, info. Nothing heavy is imported before the subcommand is known."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Arguments:
        argv: arguments after the program's name; None: those of the process.

    Returns:
        0 on success, 2 for a mistake in the request (said in one line on stderr), 130 after an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fastdiv", description="Per-token quantities of language models, exact and fused."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | bench | check | info")
    commands.add_parser("train", add_help=False, help="train a causal LM on verifiable rewards (fastdiv train --help)")
    commands.add_parser("bench", add_help=False, help="run the benchmarks (fastdiv bench --help)")
    check = commands.add_parser("check", help="prove the kernels on this machine, without a GPU")
    check.add_argument(
        "--aot",
        nargs="*",
        metavar="TARGET",
        required=True,
        help="compile every Triton kernel for these targets (sm_90, gfx942, ...; none: all that are known) and fail on "
        "spilled registers or 32-bit pointer arithmetic",
    )
    check.add_argument("--brief", action="store_true", help="one line a target instead of one a kernel")
    info = commands.add_parser("info", help="what is installed, and which backends run here")
    info.add_argument("--tasks", action="store_true", help="list the reasoning-gym tasks that train can use")
    info.add_argument("--objectives", action="store_true", help="list the objectives")
    # These two bring parsers of their own.
    passing: dict[str, Callable[[list[str]], int]] = {"train": _train, "bench": _bench}
    if arguments and arguments[0] in passing:
        return passing[arguments[0]](arguments[1:])
    parsed = parser.parse_args(arguments)
    return _check(parsed) if parsed.command == "check" else _info(parsed)


def _train(arguments: list[str]) -> int:
    from fastdiv.training.config import UserError

    try:
        config = parse_train(arguments)
        from fastdiv.training import report
        from fastdiv.training.loop import train

        records = train(config)
    except (UserError, OSError) as error:  # of the system: a full disk, a folder that vanished
        return _refuse("train", error)
    except KeyboardInterrupt:
        print(
            "fastdiv train: interrupted; the same command with --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        return _INTERRUPTED
    print(report.table(records))
    print(f"metrics, curves and checkpoints: {config.output}")
    return 0


def parse_train(arguments: list[str]) -> Any:
    """The :class:`~fastdiv.training.config.TrainConfig` that flags and ``--config`` ask for; flags win.

    ``--config NAME`` without such a file takes ``NAME.yaml`` out of the package (``demo``).

    Raises:
        UserError: unknown flag or key, wrong type, value out of range, or jsonargparse is missing; one line.
    """
    from fastdiv.training.config import TrainConfig, UserError

    try:
        import jsonargparse
    except ImportError as error:
        raise UserError(
            f"the command line of train needs jsonargparse ({error}): pip install 'fastdiv[train]'"
        ) from error
    parser = jsonargparse.ArgumentParser(
        prog="fastdiv train",
        description="On-policy training of a causal language model on verifiable rewards.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with the options below, or the name of a packaged one"
    )
    parser.add_class_arguments(TrainConfig)
    try:
        parsed = parser.parse_args(_expand(arguments))
        parsed.pop("config", None)
        return TrainConfig.from_dict(parsed.as_dict())
    except UserError:
        raise
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{error}{_near(str(error))} (options: fastdiv train --help)") from error


def _near(error: str) -> str:
    """The options that a flag or key in jsonargparse's error may have meant."""
    from fastdiv import accept
    from fastdiv.training.config import TrainConfig, flatten

    for pattern in (
        r"unrecognized arguments: --([\w.-]+)",
        r"Option '(.*)' is not",
        r"Group '(.*)' does not .* '(.*)'",
    ):
        if found := re.search(pattern, error):
            return accept.suggestion(".".join(found.groups()), flatten(TrainConfig()))
    return ""


def _expand(arguments: list[str]) -> list[str]:
    """A bare ``--resume`` gets its value, the name of a packaged configuration its path."""
    folder = Path(__file__).parent / "training" / "configs"
    arguments = ["--resume=true" if argument == "--resume" else argument for argument in arguments]
    found = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        name = argument.removeprefix("--config=")
        if (previous == "--config" or name != argument) and not Path(name).is_file():
            packaged = folder / f"{name}.yaml"
            argument = argument.removesuffix(name) + str(packaged) if packaged.is_file() else argument
        found.append(argument)
    return found


def _bench(arguments: list[str]) -> int:
    for name in ("fastdiv.benchmarks.__main__", "benchmarks.__main__"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and name.startswith(error.name):
                continue
            return _refuse("bench", f"{error}: pip install 'fastdiv[bench]'")
        return int(module.main(arguments))
    return _refuse("bench", "the benchmarks are not installed; run this in a checkout of the repository")


def _check(arguments: argparse.Namespace) -> int:
    try:
        from fastdiv.backends.triton import aot
    except ImportError as error:
        return _refuse("check", f"{error}: pip install 'fastdiv[triton]'")
    try:
        targets = [aot.target(name) and name for name in arguments.aot or aot.TARGETS]
        return aot.check(targets, brief=arguments.brief)
    except ValueError as error:
        return _refuse("check", error)


def _info(arguments: argparse.Namespace) -> int:
    if arguments.tasks:
        from fastdiv.training.config import UserError
        from fastdiv.training.data import task_names

        try:
            print("\n".join(task_names()))
        except UserError as error:
            return _refuse("info", error)
        return 0
    import fastdiv

    if arguments.objectives:
        for entry in fastdiv.objectives.list():
            source = f"arXiv {entry.arxiv}" if entry.arxiv else ""
            print(f"{entry.name:24} {entry.family:14} {entry.paper} {source}".rstrip())
        return 0
    try:
        found = dict(fastdiv.info())
    except ValueError as error:  # FASTDIV_ISA
        return _refuse("info", error)
    reasons: Any = found["backends"]  # None, or why a backend is absent
    found["backends"] = {name: f"absent: {reason}" if reason else "ready" for name, reason in reasons.items()}
    _show({key: value for key, value in found.items() if value is not None})
    return 0


def _show(values: Any, indent: int = 0) -> None:
    width = max((len(str(key)) for key in values), default=0)
    for key, value in values.items():
        label = " " * indent + f"{key!s:{width}}"
        if isinstance(value, dict) and value:
            print(label.rstrip())
            _show(value, indent + 2)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple | set | frozenset) else str(value)
            print(f"{label}  {text}")


def _refuse(command: str, error: object) -> int:
    print(f"fastdiv {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return _USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
