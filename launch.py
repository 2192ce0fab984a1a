"""The command line: parses, sets up the process, calls one function. Every import of ours waits for its command."""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

Parsed = argparse.Namespace
OK, UNEXPECTED, USAGE = 0, 1, 2


class Command:
    """What is called with what was parsed, `module:function` of mixtral_jax or one of ours, and how it is explained."""

    def __init__(self, calls: str | Callable[[Parsed], int], text: str, *arguments: tuple[str, dict[str, Any]]):
        self.calls, self.text, self.arguments = calls, text, arguments
        self.takes_overrides = any(name == "config" for name, _ in arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (train/errors.py has them); the last line says why."""
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:  # bytes of another encoding, which Python keeps as half surrogates
            print(f"error: {word!a} on the command line is not UTF-8", file=sys.stderr)
            return USAGE
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.version:
        print(f"mixtral-jax {_version()}")
        return OK
    if "does" not in args:
        parser.print_help()
        return USAGE
    if rest and not args.does.takes_overrides:
        parser.error(f"unrecognised arguments of {args.command}: {' '.join(rest)}")
    args.overrides, args.is_process = rest, argv is None
    _environment()
    try:
        importlib.import_module("mixtral_jax")
    except ImportError as error:  # a copy without its links, which says so
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    from mixtral_jax.train.streams import Lasting

    out = Lasting(sys.stdout)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(Lasting(sys.stderr)):
        code = _call(args)
        out.flush()
        if code == OK and out.error is not None:  # of a run's own lines nothing is lost: its log has them
            return _explain(OSError(out.error.errno, f"the output could not be written: {out.error.strerror}"))
    return code


def _call(args: Parsed) -> int:
    try:
        calls = args.does.calls
        return _forward(calls, args) if isinstance(calls, str) else calls(args)
    except KeyboardInterrupt:
        print("exit 1: interrupted", file=sys.stderr)
        return UNEXPECTED
    except Exception as error:
        return _explain(error, args.traceback)


def _explain(error: Exception, with_traceback: bool = False) -> int:
    from mixtral_jax.train.errors import explain

    return explain(error, with_traceback)


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options; no abbreviations, as an override must not pass for an option."""
    text = "Pretrain, fine-tune, convert and plan Mixtral models in JAX."
    parser = argparse.ArgumentParser(prog="mixtral-jax", description=text, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    places = {"": parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")}
    epilog = "Overrides follow the file: a.b=c, --a.b c or --a.b=c, typed as YAML (steps=1e6 x=null xs=[1,2])."
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in places:
            outer, _, last = group.rpartition(" ")
            above = places[outer].add_parser(last, help=GROUPS[group], description=GROUPS[group])
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
    """Call `module:function` with the positional arguments, a CFG among them read, and the options as keywords."""
    positional, options = [], {}
    for argument, told in args.does.arguments:
        key = told.get("dest", argument.strip("-").replace("-", "_"))
        if argument == "config":
            positional.append(_load(args).config)
        elif argument == key:
            positional.append(getattr(args, key))
        else:
            options[key] = getattr(args, key)
    result = _function(*calls.split(":"))(*positional, **options)
    return result if isinstance(result, int) else OK


def _function(module: str, name: str) -> Callable[..., Any]:
    """A function of ours, imported now; `module` is counted from mixtral_jax."""
    return getattr(importlib.import_module(f"mixtral_jax.{module}"), name)


def _load(args: Parsed, command: str | None = None) -> Any:
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
    config = _load(args).config
    _join(args, config)
    return _function("train.commands.evaluate", "evaluate")(args.checkpoint, config, as_json=args.as_json)


def _join(args: Parsed, config: Any) -> None:
    _function("train.run", "set_xla_flags")(config.compute.xla_flags)
    how = {key: getattr(args, key) for key in ("coordinator", "num_processes", "process_id", "timeout")}
    _function("train.run", "initialize")(**how)


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
    return OK


def _submit(args: Parsed) -> int:
    """Options go to the engine by name."""
    options = {key: value for key, value in vars(args).items() if key not in ("does", "command", "config", "overrides")}
    return _function("train.launchers", "submit")(args.subcommand, args.config, args.overrides, options)


def _not_built(args: Parsed) -> int:
    raise ValueError(f"{args.command} is not built yet")


def _count(text: str) -> float:
    """`10B` as 1e10."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return float(number) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 1e10 or 10B") from None


def _told(argument: str, text: str, **told: Any) -> tuple[str, dict[str, Any]]:
    """An argument, and what argparse is told of it; a default is shown, and its type is the argument's."""
    if "default" in told:
        told |= {"type": type(told["default"])}
        text += " (default: %(default)s)"
    return argument, {"help": text, **told}


def _flag(argument: str, text: str, **told: Any) -> tuple[str, dict[str, Any]]:
    return _told(argument, text, **{"action": "store_true", **told})


_CFG = _told("config", "the run's YAML file", metavar="CFG")
_CHECKPOINT = _told("checkpoint", "an Orbax or Hugging Face directory, a run, or a run's step", metavar="CHECKPOINT")
_JSON = _flag("--json", "print one JSON object", dest="as_json")
_DTYPE = _told("--dtype", "cast; default: as stored", choices=("float32", "bfloat16", "float16"))
_ANYTHING = _told("rest", "anything", nargs=argparse.REMAINDER)
_JOINING = (
    _told("--coordinator", "address of process 0 of a run of several processes", metavar="HOST:PORT"),
    _told("--num-processes", "number of processes of the run", type=int, metavar="N"),
    _told("--process-id", "number of this process, from 0", type=int, metavar="I"),
    _told("--timeout", "seconds in which the processes must find each other", default=60.0, metavar="SECONDS"),
)
_TRAINING = (
    _CFG,
    _flag("--dry-run", "print what would be trained, on what, and exit"),
    _flag("--force", "begin anew; the run that is there is moved to <run>.old-N"),
    *_JOINING,
)
_SUBMITTING = (
    _CFG,
    _flag("--go", "hand over and start; without it files are written and nothing is started"),
    _told("--sweep", "values of a setting, each a run of its own; may be repeated: all combinations",
          action="append", metavar="A.B=X,Y"),
)  # fmt: skip
_NODES = (_told("--nodes", "machines", default=1, metavar="N"),
          _told("--devices", "GPUs of each", default=8, metavar="N"))  # fmt: skip
_ON_CLUSTER = (_told("--topology", "TPU slices such as v5p-64 or 2xv5e-256, in place of nodes of GPUs"),
               _told("--image", "container that has this project (see the Dockerfile)", required=True))  # fmt: skip
_CACHE = _told("--cache-dir", "the cache; default: data.cache_dir of CFG, else its default", metavar="DIR")
_SRC_DST = (
    _told("src", "directory to read", metavar="SRC"),
    _told("dst", "directory to make; it must not exist yet", metavar="DST"),
    _flag("--force", "replace DST, in one step at the very end"),
)

GROUPS = {
    "convert": "checkpoints and adapters between formats",
    "data": "tokenise, pack and look at data",
    "data cache": "look at prepared data, and remove some",
    "config": "look at run files",
    "submit": "files for a cluster, or a rehearsal on this machine",
    "runs": "which runs there are, how they differ, what one is doing",
}
COMMANDS = {
    "pretrain": Command(_train, "train on documents: next-token prediction", *_TRAINING),
    "sft": Command(_train, "fine-tune on chats or prompt-completion pairs; only the answers are learned", *_TRAINING),
    "dpo": Command(_train, "learn from pairs of a preferred and a rejected answer", *_TRAINING),
    "convert hf2orbax": Command(
        "convert:hf2orbax", "stream a Hugging Face directory into an Orbax model directory", *_SRC_DST, _DTYPE),
    "convert orbax2hf": Command(
        "convert:orbax2hf", "stream an Orbax model directory into a Hugging Face one", *_SRC_DST, _DTYPE,
        _told("--max-shard-size", "largest safetensors file", default="5GB")),
    "convert verify": Command(
        "train.commands.tools:verify", "compare two checkpoints: tensors and logits",
        _told("a", "a checkpoint directory of any format", metavar="A"), _told("b", "another", metavar="B"), _JSON,
        _told("--prompts", "text file, one prompt a line, instead of the built-in ones", metavar="FILE")),
    "convert upcycle": Command(
        "convert:upcycle", "dense Mistral or Llama to Mixtral, with the same outputs at step 0", *_SRC_DST,
        _told("--experts", "experts per layer, each a copy of the dense one", default=8),
        _told("--top-k", "experts per token", default=2),
        _told("--noise", "relative noise on the copies; 0 keeps outputs equal", default=0.0)),
    "convert resize-vocab": Command(
        "convert:resize_vocab", "add rows to embedding and head, each the mean of the old ones", *_SRC_DST,
        _told("--vocab-size", "rows afterwards", type=int, required=True)),
    "convert peft2lora": Command(
        "convert:peft2lora", "a PEFT adapter into ours", *_SRC_DST,
        _told("--base", "its base model; default: what adapter_config.json names", metavar="DIR")),
    "convert lora2peft": Command(
        "convert:lora2peft", "our adapter into one that PEFT loads", *_SRC_DST,
        _told("--base", "the model that it names; default: its own, in DST/base unless transformers can open it",
              metavar="DIR")),
    "convert merge-lora": Command(
        "convert:merge_lora", "a checkpoint with an adapter folded into its weights", *_SRC_DST,
        _told("--adapter", "the adapter to fold in", required=True, metavar="DIR")),
    "data prepare": Command(
        "train.commands.tools:prepare", "tokenise and pack everything that a run reads", _CFG,
        _told("--part", "only the I-th of N parts, to spread the work over machines", metavar="I/N")),
    "data train-tokenizer": Command(
        "train.commands.tools:train_tokenizer", "train a SentencePiece BPE model with byte fallback",
        _told("files", "text, jsonl or parquet files to learn from", nargs="+", metavar="FILE"),
        _told("--output", "the .model file to write", required=True, metavar="MODEL"),
        _told("--vocab-size", "number of pieces", default=32000),
        _told("--text-key", "column that holds the text", default="text"),
        _flag("--force", "replace MODEL if it exists")),
    "data preview": Command(
        "train.commands.tools:preview", "samples with the learned tokens coloured, and the mixture", _CFG,
        _told("--rows", "how many rows to show", default=3)),
    "data cache ls": Command(
        "train.commands.cache:ls", "what prepared data there is: of what, how large, when used last",
        _told("file", "a run's YAML file, for its data.cache_dir", nargs="?", metavar="CFG"), _CACHE, _JSON),
    "data cache rm": Command(
        "train.commands.cache:rm", "remove what no process uses",
        _told("ids", "ids that `data cache ls` shows, or their beginnings; and CFG", nargs="*", metavar="ID"), _CACHE,
        _told("--unused-for", "what was not used for so long: 30d, 12h, 4w", metavar="TIME"),
        _flag("--unfinished", "what was begun and is not whole"),
        _flag("--all", "everything that no process uses", dest="everything"),
        _flag("--yes", "do not ask"),
        _flag("--dry-run", "say what would be removed"), _JSON),
    "plan": Command(
        _plan, "compile a run for a machine without having it", _CFG,
        _told("--topology", "TPU slice or GPUs, such as v5p-64, 2xv5e-256, h100-8, 8xh100-8, a100-4, h200-8, b200-64"),
        _told("--devices", "plan for N local CPU devices instead", type=int, metavar="N"),
        _flag("--search", "try meshes, micro-batches, remat"), _told("--between-nodes", "Gb/s of one chip", type=float),
        _told("--tokens", "length of the training, such as 1e12 or 10B, for days and chip-hours", type=_count),
        _told("--mfu", "share of the peak to expect, beside the bound, such as 0.4", type=float),
        _told("--json", "write the result there too; - for stdout", metavar="FILE")),
    "eval": Command(
        _evaluate, "loss, perplexity and bits per byte of each source", _CHECKPOINT, _CFG, _JSON, *_JOINING),
    "generate": Command(
        "train.commands.generate:generate", "continue a prompt or answer in a chat", _CHECKPOINT,
        _told("--prompt", "text to continue; may be repeated", action="append", dest="prompts", metavar="TEXT"),
        _flag("--chat", "the prompt is a user's message"),
        _told("--system", "system prompt of the chat", metavar="TEXT"),
        _told("--turns", "JSON file with the messages of the chat so far", metavar="FILE"),
        _told("--template", "chat format; default: the run's, or the tokenizer's",
              choices=("v1", "v3", "chatml", "zephyr", "llama3")),
        _told("--tokenizer", "tokenizer, if the checkpoint directory has none", metavar="PATH"),
        _told("--max-new-tokens", "longest continuation", default=128),
        _told("--temperature", "0 takes the likeliest token", default=0.8),
        _told("--top-k", "sample from this many likeliest tokens; 0: from all", default=0),
        _told("--top-p", "sample from the likeliest tokens of this total mass", default=1.0),
        _told("--seed", "the same seed gives the same text", default=0),
        _told("--dtype", "default: float32 on CPU, else bfloat16", choices=("float32", "bfloat16"))),
    "runs ls": Command(
        "train.commands.runs:ls", "the runs in a directory: state, step, loss, speed, goodput, age",
        _told("directory", "where run directories are", nargs="?", default="runs", metavar="DIR"),
        _flag("--json", "print a JSON list", dest="as_json")),
    "runs diff": Command(
        "train.commands.runs:diff", "settings, versions and losses in which two runs differ, and how each ended",
        _told("a", "a run's directory", metavar="A"), _told("b", "another", metavar="B"), _JSON),
    "runs tail": Command(
        "train.commands.runs:tail", "what a run said last",
        _told("run", "its directory", metavar="RUN"),
        _told("--lines", "how many", default=10),
        _flag("--follow", "go on with what it says next, until it ends or Ctrl-C")),
    "config show": Command(_show, "the resolved file, each value with the place that set it", _CFG),
    "config schema": Command(
        "train.commands.tools:schema", "JSON Schema of a stage's file",
        _told("stage", "the stage", choices=("pretrain", "sft", "dpo"))),
    "doctor": Command("train.commands.doctor:examine", "versions, devices, kernels, known-bad pairs"),
    "routing": Command(_not_built, "look into the router (not built yet)", _ANYTHING),
    "submit slurm": Command(
        _submit, "an sbatch script that saves ahead of its limit and requeues itself", *_SUBMITTING, *_NODES,
        _told("--processes", "tasks on each node", default=1, metavar="N"),
        _told("--time", "limit of the job, as sbatch has it"), _told("--partition", "of the cluster"),
        _told("--account", "to charge"), _told("--qos", "quality of service"),
        _flag("--no-gpus", "do not ask for GPUs", dest="gpus", action="store_false"),
        _told("--container", "image for srun --container-image", metavar="IMAGE"),
        _told("--python", "Python of the nodes; default: this one", metavar="PATH"),
        _told("--warn-seconds", "how long ahead of the limit the run is told to save", default=180),
        _told("--chain", "N jobs one after another, where the site forbids requeue", default=1, metavar="N"),
        _told("--sbatch", "one more line, such as --exclusive; may be repeated", action="append", dest="lines")),
    "submit k8s": Command(
        _submit, "a JobSet, or one indexed Job, with restarts by exit code", *_SUBMITTING, *_NODES, *_ON_CLUSTER,
        _told("--volume", "claim of a volume and where it is mounted; may be repeated", action="append",
              dest="volumes", metavar="CLAIM:/PATH"),
        _told("--namespace", "of the objects", default="default"), _told("--queue", "of Kueue"),
        _told("--grace-seconds", "for the save when a pod is taken away", default=300),
        _told("--max-restarts", "of a JobSet; disruptions are not counted", default=10),
        _flag("--plain-job", "without JobSet", dest="plain")),
    "submit sky": Command(
        _submit, "a managed job of SkyPilot", *_SUBMITTING, _NODES[0],
        _told("--accelerators", "of each node, such as H100:8, or a TPU slice, such as tpu-v6e-16", required=True),
        _told("--infra", "where, such as aws or gcp/us-central1"),
        _told("--image", "container that has this project; default: the working directory is installed"),
        _told("--mount", "bucket for run, cache and data; may be repeated", action="append", dest="mounts",
              metavar="/PATH=URL")),
    "submit xpk": Command(
        _submit, "the command line of an xpk workload", *_SUBMITTING, *_ON_CLUSTER,
        _told("--cluster", "of xpk", required=True), _told("--project", "of the cloud"), _told("--zone", "of it"),
        _told("--max-restarts", "of the workload", default=10)),
    "submit local": Command(
        _submit, "processes on this machine under a supervisor, that kills them where asked to", *_SUBMITTING,
        _told("--processes", "processes of the run", default=1, metavar="N"),
        _told("--devices", "virtual CPU devices of each; with --accelerators what the machine has", default=1,
              metavar="N"),
        _told("--kill-every", "kill one of them after so much training, again and again: 30s, 2m", metavar="TIME"),
        _told("--kills", "at most so many", type=int, metavar="N"),
        _flag("--accelerators", "one process on what the machine has, no CPU devices", dest="on_cpu",
              action="store_false")),
}  # fmt: skip

if __name__ == "__main__":
    if sys.flags.safe_path:  # PYTHONSAFEPATH is set, so that Python has not put this file's directory there
        sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    sys.exit(main())
