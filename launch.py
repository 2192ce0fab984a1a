"""The command line: parses, sets up the process, calls one function. Every import of ours waits for its command."""

import argparse
import glob
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

Parsed = argparse.Namespace
OK, UNEXPECTED, USAGE = 0, 1, 2
STAGES = {
    "pretrain": "train on documents: next-token prediction",
    "sft": "fine-tune on chats or prompt-completion pairs; only the answers are learned",
    "dpo": "learn from pairs of a preferred and a rejected answer",
}
# Attributes of a parsed command line that are no arguments of the function it calls.
_OUR_OWN = {"run", "takes_overrides", "traceback", "command", "subcommand", "overrides"}
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd")
RESERVED = {"routing": "look into the router", "submit": "start a run on a cluster"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (INTERFACE: 0, 1, 2, 3, 4, 75, 124); the last line says why."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if "run" not in args:
        parser.print_help()
        return USAGE
    if rest and not args.takes_overrides:
        parser.error(f"unrecognised arguments of {args.command}: {' '.join(rest)}")
    args.overrides = rest
    _environment()
    try:
        return args.run(args) or OK
    except BrokenPipeError:  # `... | head` closed our stdout: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("exit 1: interrupted", file=sys.stderr)
        return UNEXPECTED
    except Exception as error:
        from mixtral_jax.train.errors import is_for_the_user

        mistake = is_for_the_user(error)
        if args.traceback or not mistake:
            traceback.print_exc()
        if not mistake:
            print(f"exit 1: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            return UNEXPECTED
        problems = str(error).splitlines() or [type(error).__name__]
        print(*(f"error: {line}" for line in problems), sep="\n", file=sys.stderr)
        if len(problems) > 1:
            print(f"exit 2: {len(problems)} problems, named above", file=sys.stderr)
        return USAGE


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = _Parser(prog="mixtral-jax", description="Pretrain, fine-tune, convert and plan Mixtral models in JAX.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=_Parser)
    for stage, text in STAGES.items():
        _add_training(commands, stage, text)
    _add_convert(commands)
    _add_data(commands)
    _add_plan(commands)
    _add_use(commands)
    _add_config(commands)
    _command(commands, "doctor", "versions, devices, kernels, known-bad pairs", "train.commands.doctor:examine")
    for name, text in RESERVED.items():
        _command(commands, name, f"{text} (not built yet)", _not_built, overrides=True)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """No abbreviations: an override must not pass for an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Help, **kwargs})


def _command(
    commands: Any, name: str, text: str, calls: str | Callable[[Parsed], int | None], *, overrides: bool = False
) -> argparse.ArgumentParser:
    """A command that `calls` a function here, or `module:function` of mixtral_jax with its options as keywords."""
    epilog = "Overrides follow the file: a.b=c, --a.b c or --a.b=c, typed as YAML (steps=1e6 x=null xs=[1,2])."
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog if overrides else None)
    run = partial(_forward, calls) if isinstance(calls, str) else calls
    parser.set_defaults(run=run, takes_overrides=overrides)
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    return parser


def _group(commands: Any, name: str, text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(title="commands", metavar="COMMAND", dest="subcommand", required=True)


def _add_training(commands: Any, stage: str, text: str) -> None:
    parser = _command(commands, stage, text, _train, overrides=True)
    parser.add_argument("config", metavar="CFG", help=f"YAML file that says `stage: {stage}`")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, on what, and exit")
    parser.add_argument("--force", action="store_true", help="start a finished run again from the beginning")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 of a run of several processes")
    parser.add_argument("--num-processes", type=int, metavar="N", help="number of processes of the run")
    parser.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def _add_convert(commands: Any) -> None:
    group = _group(commands, "convert", "checkpoints and adapters between formats")
    for name, text in (
        ("hf2orbax", "stream a Hugging Face directory into an Orbax model directory"),
        ("orbax2hf", "stream an Orbax model directory into a Hugging Face one"),
    ):
        parser = _source_and_target(group, name, text)
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast; default: as stored")
        if name == "orbax2hf":
            parser.add_argument("--max-shard-size", default="5GB", help="largest safetensors file")
    parser = _command(group, "verify", "compare two checkpoints: tensors and logits", "train.commands.tools:verify")
    parser.add_argument("a", metavar="A", help="a checkpoint directory of any format")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--prompts", metavar="FILE", help="text file, one prompt a line, instead of the built-in ones")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the report as one JSON object")
    parser = _source_and_target(group, "upcycle", "dense Mistral or Llama to Mixtral, with the same outputs at step 0")
    parser.add_argument("--experts", type=int, default=8, help="experts per layer, each a copy of the dense one")
    parser.add_argument("--top-k", type=int, default=2, help="experts per token")
    parser.add_argument("--noise", type=float, default=0.0, help="relative noise on the copies; 0 keeps outputs equal")
    parser = _source_and_target(group, "resize-vocab", "add rows to embedding and head, each the mean of the old ones")
    parser.add_argument("--vocab-size", type=int, required=True, help="rows afterwards")
    parser = _source_and_target(group, "peft2lora", "a PEFT adapter into ours")
    parser.add_argument("--base", metavar="DIR", help="its base model; default: what adapter_config.json names")
    _source_and_target(group, "lora2peft", "our adapter into one that PEFT loads")
    parser = _source_and_target(group, "merge-lora", "a checkpoint with an adapter folded into its weights")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter to fold in")


def _source_and_target(group: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = _command(group, name, text, f"convert:{name.replace('-', '_')}")
    parser.add_argument("src", metavar="SRC", help="directory to read")
    parser.add_argument("dst", metavar="DST", help="directory to make; it must not exist yet")
    parser.add_argument("--force", action="store_true", help="replace DST, in one step at the very end")
    return parser


def _add_data(commands: Any) -> None:
    group = _group(commands, "data", "tokenise, pack and look at data")
    parser = _command(
        group,
        "prepare",
        "tokenise and pack everything that a run reads",
        "train.commands.tools:prepare",
        overrides=True,
    )
    parser.add_argument("config", metavar="CFG", help="the run's YAML file")
    parser.add_argument("--part", metavar="I/N", help="only the I-th of N parts, to spread the work over machines")
    parser = _command(
        group,
        "train-tokenizer",
        "train a SentencePiece BPE model with byte fallback",
        "train.commands.tools:train_tokenizer",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="text, jsonl or parquet files to learn from")
    parser.add_argument("--output", required=True, metavar="MODEL", help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=32000, help="number of pieces")
    parser.add_argument("--text-key", default="text", help="column that holds the text")
    parser.add_argument("--force", action="store_true", help="replace MODEL if it exists")
    parser = _command(
        group,
        "preview",
        "samples with the learned tokens coloured, and the mixture",
        "train.commands.tools:preview",
        overrides=True,
    )
    parser.add_argument("config", metavar="CFG", help="the run's YAML file")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show")


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", "compile a run for a machine without having it", _plan, overrides=True)
    parser.add_argument("config", metavar="CFG", help="the run's YAML file")
    parser.add_argument("--topology", help="TPU slice such as v5p-64, v5e-256 or 2xv5e-256")
    parser.add_argument("--devices", type=int, metavar="N", help="plan for N local CPU devices instead")
    parser.add_argument("--search", action="store_true", help="try meshes, micro-batches and rematerialisation")
    parser.add_argument("--tokens", type=float, help="length of the training, for days and chip-hours")
    parser.add_argument("--json", metavar="FILE", help="write the result there too; - for stdout")


def _add_use(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        "loss, perplexity and bits per byte of each source",
        "train.commands.use:evaluate",
        overrides=True,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="an Orbax or Hugging Face directory, or a run's step")
    parser.add_argument("config", metavar="CFG", help="YAML file whose data.validation is read")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    parser = _command(commands, "generate", "continue a prompt or answer in a chat", "train.commands.use:generate")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="an Orbax or Hugging Face directory, or a run's step")
    parser.add_argument(
        "--prompt", action="append", dest="prompts", metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument(
        "--template", choices=("v1", "v3", "chatml"), help="chat format; default: the run's, or by the tokenizer"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer, if the checkpoint directory has none")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest continuation")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total mass")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")


def _add_config(commands: Any) -> None:
    group = _group(commands, "config", "look at run files")
    parser = _command(group, "show", "the resolved file, each value with the place that set it", _show, overrides=True)
    parser.add_argument("config", metavar="CFG", help="YAML file")
    parser = _command(group, "schema", "JSON Schema of a stage's file", "train.commands.tools:schema")
    parser.add_argument("stage", choices=tuple(STAGES), help="the stage")


def _environment() -> None:
    """What must be in the environment before jax is imported. Nothing here changes a number."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(".cache", "mixtral-jax", "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's info and warning lines
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers tokenise in parallel already
    if not any(map(glob.glob, _ACCELERATORS)):  # libtpu, there for `plan`, would look for a TPU, in vain and aloud
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _function(module: str, name: str) -> Callable[..., Any]:
    """A function of ours, imported now; `module` is counted from mixtral_jax."""
    return getattr(importlib.import_module(f"mixtral_jax.{module}"), name)


def _forward(calls: str, args: Parsed) -> int:
    """Call `module:function` with the positional arguments, a CFG among them read, and the options as keywords."""
    values = {key: value for key, value in vars(args).items() if key not in _OUR_OWN}
    positional = [values.pop(key) for key in ("checkpoint", "src", "dst", "a", "b", "files", "stage") if key in values]
    if "config" in values:
        positional.append(_load(values.pop("config"), args.overrides).config)
    module, name = calls.split(":")
    result = _function(module, name)(*positional, **values)
    return result if isinstance(result, int) else OK


def _load(path: str, overrides: list[str], command: str | None = None) -> Any:
    return _function("train.config.load", "load_config")(path, overrides, command=command)


def _not_built(args: Parsed) -> int:
    raise ValueError(f"{args.command} is not built yet")


def _train(args: Parsed) -> int:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        _function("train.run.memory", "keep_freed_memory")()
    config, provenance = _load(args.config, args.overrides, args.command)
    if args.dry_run:
        return _function("train.plan.dry_run", "dry_run")(config, provenance)
    _function("train.run.processes", "initialize")(
        coordinator=args.coordinator, num_processes=args.num_processes, process_id=args.process_id
    )
    return _function("train.trainer", "run")(config, provenance, force=args.force)


def _plan(args: Parsed) -> int:
    """Compiling for a slice that is not there: on the CPU, with as many of its devices as asked for."""
    if args.devices:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
        )
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return _forward("train.plan.plan:run", args)


def _show(args: Parsed) -> int:
    config, provenance = _load(args.config, args.overrides)
    print(_function("train.config.load", "resolved_yaml")(config, provenance), end="")
    return OK


if __name__ == "__main__":
    sys.exit(main())
