"""Every command: what it calls, its options, and how they are explained. Nothing of ours is imported here."""

import argparse
from collections.abc import Callable
from typing import Any


class Command:
    """What is called with what was parsed, `module:function` of mixtral_jax or a name in launch.py's PREPARED."""

    def __init__(self, calls: str, text: str, *arguments: tuple[str, dict[str, Any]]):
        self.calls, self.text, self.arguments = calls, text, arguments
        self.takes_overrides = any(name == "config" for name, _ in arguments)


def _count(text: str) -> float:
    """`10B` as 1e10."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return float(number) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 1e10 or 10B") from None


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """`1,2` as (1, 2)."""

    def numbers(text: str) -> tuple[Any, ...]:
        try:
            return tuple(map(kind, text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} are no numbers such as 1,2") from None

    return numbers


def _told(argument: str, text: str, **told: Any) -> tuple[str, dict[str, Any]]:
    """An argument, and what argparse is told of it; a default is shown, and its type is the argument's."""
    if "default" in told:
        told |= {"type": type(told["default"])}
        text += " (default: %(default)s)"
    return argument, {"help": text, **told}


def _flag(argument: str, text: str, **told: Any) -> tuple[str, dict[str, Any]]:
    return _told(argument, text, **{"action": "store_true", **told})


_CFG = _told("config", "the run's YAML file", metavar="CFG")
_CFG_OR_NONE = _told("config", "the run's YAML file, whose validation sources are measured", nargs="?", metavar="CFG")
_TEMPLATE = _told("--template", "chat format; default: the run's, or the tokenizer's",
                  choices=("v1", "v3", "chatml", "zephyr", "llama3"))  # fmt: skip
_CHECKPOINT = _told("checkpoint", "an Orbax or Hugging Face directory, a run, or a run's step", metavar="CHECKPOINT")
_JSON = _flag("--json", "print one JSON object", dest="as_json")
_DTYPE = _told("--dtype", "cast; default: as stored", choices=("float32", "bfloat16", "float16"))
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
    "pretrain": Command("train", "train on documents: next-token prediction", *_TRAINING),
    "sft": Command("train", "fine-tune on chats or prompt-completion pairs; only the answers are learned", *_TRAINING),
    "dpo": Command("train", "learn from pairs of a preferred and a rejected answer", *_TRAINING),
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
        "plan", "compile a run for a machine without having it", _CFG,
        _told("--topology", "TPU slice or GPUs, such as v5p-64, 2xv5e-256, h100-8, 8xh100-8, a100-4, h200-8, b200-64"),
        _told("--devices", "plan for N local CPU devices instead", type=int, metavar="N"),
        _flag("--search", "try meshes, micro-batches, remat"), _told("--between-nodes", "Gb/s of one chip", type=float),
        _told("--tokens", "length of the training, such as 1e12 or 10B, for days and chip-hours", type=_count),
        _told("--mfu", "share of the peak to expect, beside the bound, such as 0.4", type=float),
        _told("--json", "write the result there too; - for stdout", metavar="FILE")),
    "eval": Command(
        "evaluate", "loss and perplexity of each source of CFG; tasks of lm-evaluation-harness; long contexts",
        (_CHECKPOINT[0], {**_CHECKPOINT[1], "nargs": "?"}), _CFG_OR_NONE, _JSON,
        _told("--tasks", "tasks, groups or tags of lm-evaluation-harness, or local_* on files, in place of CFG's "
              "sources; `list` shows the latter", metavar="A,B"),
        _told("--data-dir", "where the files of local tasks are; default: as MIXTRAL_JAX_DATA says", metavar="DIR"),
        _told("--include", "directory of task files; may be repeated", action="append", metavar="DIR"),
        _told("--num-fewshot", "examples before each question; default: as the task says", type=int, metavar="N"),
        _told("--limit", "documents of each task; default: all", type=int, metavar="N"),
        _flag("--apply-chat-template", "questions are a user's messages"), _TEMPLATE,
        _flag("--no-fewshot-as-multiturn", "all examples stand in one message", dest="fewshot_as_multiturn",
              action="store_false"),
        _told("--system", "system prompt", metavar="TEXT"),
        _flag("--allow-code", "tasks may run what the model writes"),
        _flag("--network", "tasks may fetch their data"),
        _flag("--passkey", "how often a number is found again that a long text says once"),
        _told("--by-length", "loss by position and by length of context, on the documents of a file, a directory, or "
              "a run file's validation sources", metavar="DATA"),
        _told("--lengths", "tokens of these; default: 128, 256, ... up to the model's length", type=_several(int),
              metavar="N,N"),
        _told("--depths", "places of the number, from 0 to 1; default: 0,0.25,0.5,0.75,1", type=_several(float),
              metavar="X,X"),
        _told("--samples", "numbers for each length and depth, or documents; default: 20", type=int, metavar="N"),
        _told("--seed", "of the numbers; default: 0", type=int, metavar="N"),
        _told("--out", "where scores and samples are written; default: eval/STEP of the run, of a model directory "
              "nowhere", metavar="DIR"), *_JOINING),
    "generate": Command(
        "train.commands.generate:generate", "continue a prompt or answer in a chat", _CHECKPOINT,
        _told("--prompt", "text to continue; may be repeated", action="append", metavar="TEXT"),
        _told("--prompts", "file of prompts or chats to continue, with --out", metavar="FILE"),
        _told("--out", "file for the continuations, as jsonl; the same command goes on with one begun", metavar="FILE"),
        _told("--samples", "continuations of each of --prompts", default=1),
        _told("--batch-size", "how many of them are made at once", default=16),
        _flag("--chat", "prompts are a user's messages; without one, a conversation"),
        _told("--system", "system prompt of the chat", metavar="TEXT"),
        _told("--turns", "JSON file with the messages of the chat so far", metavar="FILE"),
        _TEMPLATE,
        _told("--tokenizer", "tokenizer, if the checkpoint directory has none", metavar="PATH"),
        _told("--max-new-tokens", "longest continuation", default=128),
        _told("--temperature", "0 takes the likeliest token", default=0.8),
        _told("--top-k", "sample from this many likeliest tokens; 0: from all", default=0),
        _told("--top-p", "sample from the likeliest tokens of this total mass", default=1.0),
        _told("--seed", "the same seed gives the same text", default=0),
        _told("--dtype", "default: float32 on CPU, else bfloat16", choices=("float32", "bfloat16"))),
    "routing": Command(
        "train.commands.routing:routing", "what the routers do with text: loads, repetition, what each expert likes",
        _CHECKPOINT,
        _told("--data", "text of a domain; may be repeated; or a run file, for its validation sources; default: "
              "those of the run, else the bundled samples", action="append", metavar="NAME=PATH"),
        _told("--against", "a checkpoint of the same shape: count what changed since", metavar="CHECKPOINT"),
        _told("--tokens", "tokens of each domain", default=50_000),
        _told("--layers", "such as 0,15,31; default: all", metavar="I,J"),
        _told("--seq-len", "tokens of a row; default: the run's, else 1024", type=int, metavar="N"),
        _told("--tokenizer", "tokenizer of both checkpoints; default: their own, which must agree", metavar="PATH"),
        _told("--out", "where the files go; default: <run>/routing/<step>, or CHECKPOINT-routing", metavar="DIR"),
        _JSON, *_JOINING),
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
    "report": Command(
        "train.report:report", "the page of one run, or of several over each other: curves, experts, samples, time",
        _told("runs", "their directories", nargs="+", metavar="RUN"),
        _told("--out", "the page; default: report.html in the run's directory, of several in this one", metavar="FILE"),
        _flag("--watch", "serve it on this machine, anew as the runs come further, until Ctrl-C"),
        _told("--port", "where --watch does; 0: any that is free", default=0),
        _told("--smooth", "draw lines as the mean over so many points; bands stay", default=1, metavar="N")),
    "config show": Command("show", "the resolved file, each value with the place that set it", _CFG),
    "config schema": Command(
        "train.commands.tools:schema", "JSON Schema of a stage's file",
        _told("stage", "the stage", choices=("pretrain", "sft", "dpo"))),
    "doctor": Command("train.commands.doctor:examine", "versions, devices, kernels, known-bad pairs"),
    "submit slurm": Command(
        "submit", "an sbatch script that saves ahead of its limit and requeues itself", *_SUBMITTING, *_NODES,
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
        "submit", "a JobSet, or one indexed Job, with restarts by exit code", *_SUBMITTING, *_NODES, *_ON_CLUSTER,
        _told("--volume", "claim of a volume and where it is mounted; may be repeated", action="append",
              dest="volumes", metavar="CLAIM:/PATH"),
        _told("--namespace", "of the objects", default="default"), _told("--queue", "of Kueue"),
        _told("--grace-seconds", "for the save when a pod is taken away", default=300),
        _told("--max-restarts", "of the run; disruptions are not counted", default=10),
        _flag("--plain-job", "without JobSet", dest="plain")),
    "submit sky": Command(
        "submit", "a managed job of SkyPilot", *_SUBMITTING, _NODES[0],
        _told("--accelerators", "of each node, such as H100:8, or a TPU slice, such as tpu-v6e-16", required=True),
        _told("--infra", "where, such as aws or gcp/us-central1"),
        _told("--image", "container that the Dockerfile made; default: the working directory is installed"),
        _flag("--on-demand", "machines that nobody takes away", dest="spot", action="store_false"),
        _told("--mount", "bucket for run, cache and data; may be repeated", action="append", dest="mounts",
              metavar="/PATH=URL")),
    "submit xpk": Command(
        "submit", "the command line of an xpk workload", *_SUBMITTING, *_ON_CLUSTER,
        _told("--cluster", "of xpk", required=True), _told("--project", "of the cloud"), _told("--zone", "of it"),
        _told("--max-restarts", "of the workload", default=10)),
    "submit local": Command(
        "submit", "processes on this machine under a supervisor, that kills them where asked to", *_SUBMITTING,
        _told("--processes", "processes of the run", default=1, metavar="N"),
        _told("--devices", "virtual CPU devices of each; with --accelerators what the machine has", default=1,
              metavar="N"),
        _told("--kill-every", "kill one of them after so much training, again and again: 30s, 2m", metavar="TIME"),
        _told("--kills", "at most so many", type=int, metavar="N"),
        _flag("--accelerators", "one process on what the machine has, no CPU devices", dest="on_cpu",
              action="store_false")),
}  # fmt: skip
