"""The command line: parses, sets up the process, calls one function. Every import of ours waits for its command.

train/commands/table.py has the commands and their options.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

Parsed = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (train/errors.py has them); the last line says why."""
    try:
        from mixtral_jax.train.errors import ExitCode, explain
    except ImportError as error:  # a copy without its links, which says so
        print(f"error: {error}", file=sys.stderr)
        return 2
    for word in sys.argv[1:] if argv is None else argv:
        try:
            word.encode()
        except UnicodeEncodeError:  # bytes of another encoding, which Python keeps as half surrogates
            print(f"error: {word!a} on the command line is not UTF-8", file=sys.stderr)
            return ExitCode.USAGE
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.version:
        print(f"mixtral-jax {_version()}")
        return ExitCode.DONE
    if "does" not in args:
        parser.print_help()
        return ExitCode.USAGE
    if rest and not args.does.takes_overrides:
        parser.error(f"unrecognised arguments of {args.command}: {' '.join(rest)}")
    args.overrides, args.is_process = rest, argv is None
    _environment()
    from mixtral_jax.train.streams import Lasting

    out = Lasting(sys.stdout)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(Lasting(sys.stderr)):
        try:
            calls = args.does.calls
            code = _forward(calls, args) if ":" in calls else PREPARED[calls](args)
        except KeyboardInterrupt:
            print("exit 1: interrupted", file=sys.stderr)
            code = ExitCode.UNEXPECTED
        except Exception as error:
            code = explain(error, args.traceback)
        out.flush()
        if code == ExitCode.DONE and out.error is not None:  # of a run's own lines nothing is lost: its log has them
            return explain(OSError(out.error.errno, f"the output could not be written: {out.error.strerror}"))
    return code


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options; no abbreviations, as an override must not pass for an option."""
    text = "Pretrain, fine-tune, convert and plan Mixtral models in JAX."
    parser = argparse.ArgumentParser(prog="mixtral-jax", description=text, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    places = {"": parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")}
    epilog = "Overrides follow the file: a.b=c, --a.b c or --a.b=c, typed as YAML (steps=1e6 x=null xs=[1,2])."
    table = importlib.import_module("mixtral_jax.train.commands.table")
    for name, command in table.COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in places:
            outer, _, last = group.rpartition(" ")
            above = places[outer].add_parser(last, help=table.GROUPS[group], description=table.GROUPS[group])
            places[group] = above.add_subparsers(title="commands", metavar="COMMAND", dest="subcommand", required=True)
        child = places[group].add_parser(word, help=command.text, description=command.text, allow_abbrev=False)
        child.epilog = epilog if command.takes_overrides else None
        child.set_defaults(does=command)
        child.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
        for argument, told in command.arguments:
            child.add_argument(argument, **told)
    return parser


def _environment() -> None:
    """What must be in the environment before jax is imported, beside what mixtral_jax sets. It changes no number."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(".cache", "mixtral-jax", "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's info and warning lines
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers tokenise in parallel already


def _forward(calls: str, args: Parsed) -> int:
    """Call `module:function` with what was given."""
    positional, options = _given(args)
    result = _function(*calls.split(":"))(*positional, **options)
    return result if isinstance(result, int) else 0


def _given(args: Parsed) -> tuple[list[Any], dict[str, Any]]:
    """The positional arguments, a CFG among them read, and the options as keywords."""
    positional, options = [], {}
    for argument, told in args.does.arguments:
        key = told.get("dest", argument.strip("-").replace("-", "_"))
        if argument == "config":
            positional.append(_load(args).config)
        elif argument == key:
            positional.append(getattr(args, key))
        else:
            options[key] = getattr(args, key)
    return positional, options


def _function(module: str, name: str) -> Callable[..., Any]:
    """A function of ours, imported now; `module` is counted from mixtral_jax."""
    return getattr(importlib.import_module(f"mixtral_jax.{module}"), name)


def _load(args: Parsed, command: str | None = None) -> Any:
    if args.config is None:
        return _function("train.config", "machine_config")(args.overrides)
    return _function("train.config", "load_config")(args.config, args.overrides, command=command)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("mixtral-jax")
    except metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


def _train(args: Parsed) -> int:
    from mixtral_jax.train.errors import command

    with command(last=args.is_process):
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            _function("train.memory", "keep_freed_memory")()
        config, provenance = _load(args, args.command)
        if args.dry_run:
            return _function("train.run", "dry_run")(config, provenance, force=args.force)
        _join(args, config)
        return _function("train.trainer", "run")(config, provenance, force=args.force)


def _evaluate(args: Parsed) -> int:
    """CFG may be left out: it may then stand behind options, and an override in its place."""
    if args.config is None or ("=" in args.config and not os.path.exists(args.config)):
        words = [word for word in (args.config, *args.overrides) if word is not None]
        args.config = next(filter(os.path.isfile, words), None)
        args.overrides = [word for word in words if word != args.config]
    (checkpoint, config), options = _given(args)
    _join(args, config)
    own = {key: value for key, value in options.items() if key not in _JOINING}
    return _function("train.commands.evaluate", "evaluate")(checkpoint, config, **own)


_JOINING = ("coordinator", "num_processes", "process_id", "timeout")


def _join(args: Parsed, config: Any) -> None:
    _function("train.run", "set_xla_flags")(config.compute.xla_flags)
    _function("train.run", "initialize")(**{key: getattr(args, key) for key in _JOINING})


def _plan(args: Parsed) -> int:
    """Compiling for a slice that is not there: on the CPU, with as many of its devices as asked for."""
    if args.devices:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={args.devices}"
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if args.topology and args.is_process:  # as a run there would have them
        where = "cuda" if _function("train.plan", "parse_topology")(args.topology).is_gpu else "tpu"
        _function("train.run", "set_xla_flags")(_load(args).config.compute.xla_flags, platform=where)
    return _forward("train.plan:run", args)


def _show(args: Parsed) -> int:
    config, provenance = _load(args)
    print(_function("train.config", "resolved_yaml")(config, provenance), end="")
    return 0


def _submit(args: Parsed) -> int:
    """Options go to the engine by name."""
    options = {key: value for key, value in vars(args).items() if key not in ("does", "command", "config", "overrides")}
    return _function("train.launchers", "submit")(args.subcommand, args.config, args.overrides, options)


# What prepares the process before anything else, by the name that the table of commands has for it.
PREPARED = {"train": _train, "evaluate": _evaluate, "plan": _plan, "show": _show, "submit": _submit}

if __name__ == "__main__":
    if sys.flags.safe_path:  # PYTHONSAFEPATH is set, so that Python has not put this file's directory there
        sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    sys.exit(main())
