"""The run configuration from a file or from code: one typed tree per stage, checked as a whole.

Every problem is found at once, and each is one line with the dotted path, the value, and the place that set it.
"""

import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from mixtral_jax.config import PRESETS, ComputeConfig, FrozenConfig
from mixtral_jax.parallel import MeshConfig
from mixtral_jax.train.config.schema import DpoStageConfig, PretrainConfig, RunConfig, SftConfig
from mixtral_jax.train.config.taken import take_adapter, take_shape
from mixtral_jax.train.config.tree import Tree, override, paths, read_tree, show, to_yaml
from mixtral_jax.train.errors import UserError, did_you_mean

Config = TypeVar("Config", bound=BaseModel)

# The stage that a file names -> its class. Also the order in which `--help` lists them.
STAGES: Mapping[str, type[RunConfig]] = {"pretrain": PretrainConfig, "sft": SftConfig, "dpo": DpoStageConfig}

# Words of other libraries -> ours; only used to make an error more helpful.
SYNONYMS = {
    "lr": "optimizer.learning_rate",
    "peak_lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "grad_clip": "optimizer.max_grad_norm",
    "max_steps": "steps",
    "train_steps": "steps",
    "max_seq_length": "seq_len",
    "max_length": "seq_len",
    "batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size, which counts sequences over the whole mesh",
    "gradient_accumulation_steps": "global_batch_size divided by micro_batch_size",
    "gradient_checkpointing": "compute.remat",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "eval.every",
    "logging_steps": "log.every",
    "bf16": "compute.dtype: bfloat16",
}

# Pydantic's names of errors -> what a writer of YAML understands; other errors keep pydantic's sentence.
_MUST_BE = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
}

# Values of Python code -> what YAML can say: tuples, paths and configuration objects are lists, text and dicts.
_PLAIN = TypeAdapter(dict[str, Any], config=ConfigDict(ser_json_inf_nan="constants"))


@dataclass(frozen=True)
class Provenance:
    """Where a configuration came from: the file as it was written, the overrides, and the origin of each value."""

    text: str
    overrides: tuple[str, ...]
    origins: Mapping[str, str]


class Loaded(NamedTuple):
    """A checked configuration and where it came from."""

    config: Any  # a RunConfig, or where there is no file a MachineConfig
    provenance: Provenance


def load_config(path: str | Path, overrides: Sequence[str] = (), *, command: str | None = None) -> Loaded:
    """Read, override, validate. `command` is the stage that the user asked for; None takes the file's own.

    Raises:
        FileNotFoundError: no such file.
        UserError: one line for each problem; the wrong command for the file is one.
    """
    tree = read_tree(path, overrides)
    config = _checked(tree, str(path), command)
    text = Path(path).read_text(encoding="utf-8")
    return Loaded(config, Provenance(text, tuple(overrides), origins(config, tree)))


class MachineConfig(FrozenConfig):
    """How a model runs where no run file says it."""

    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()


def machine_config(overrides: Sequence[str]) -> Loaded:
    """The defaults, and overrides of mesh.* and compute.*.

    Raises:
        UserError: one line for each problem.
    """
    tree = override(Tree(), overrides)
    config = validate(MachineConfig, tree)
    return Loaded(config, Provenance("", tuple(overrides), origins(config, tree)))


def read_config(start: str | Path | RunConfig | None = None, /, **changes: Any) -> RunConfig:
    """The configuration of a run, for notebooks and scripts: from a file, from another one, or from code alone.

    `read_config("run.yaml", steps=10, optimizer={"b1": 0.8}, **{"data.train.0.weight": 2.0})`

    Args:
        start: a YAML file, or a configuration, in which what was filled in stays as it is; None: `changes` say all.
        changes: by dotted path, or as dicts, which change the keys that they name (`model={"preset": ...}` takes the
            place of the whole model). Sections may be configuration objects too: `model=MixtralConfig.preset("tiny")`.

    Raises:
        FileNotFoundError: no such file.
        UserError: one line for each problem, as on the command line.
    """
    if isinstance(start, RunConfig):
        tree = Tree(start.model_dump(mode="json"))
    else:
        tree = Tree() if start is None else read_tree(start)
    plain = _PLAIN.dump_python(changes, mode="json", fallback=lambda x: getattr(x, "tolist", x.__repr__)())
    for path, value in plain.items():
        tree.merge(path, value, "argument")
    return _checked(tree, "load_config(...)" if start is None else str(start), None)


def validate(
    config_class: type[Config],
    tree: Tree,
    *,
    problems: Mapping[str, str] | None = None,
    also_known: Sequence[str] = (),
) -> Config:
    """Build the config, or name everything that is wrong.

    `problems` (by dotted path) were found before; `also_known` are paths that stand in files but not in the class.

    Strict, as pydantic is about JSON, where lists stand for tuples and dicts for sections: a boolean is no number, a
    string is neither, so `tensorboard: no` is an error here. But `1e6` is a whole number.

    Raises:
        UserError: one line for each problem.
    """
    found, config = dict(problems or {}), None
    try:
        config = config_class.model_validate_json(json.dumps(_whole_numbers(tree.values)), strict=True)
    except ValidationError as error:
        known = [*known_paths(config_class), *also_known]
        found |= {path: text for path, text in _sentences(error, tree, known) if path not in found}
    if found or config is None:
        raise UserError("\n".join(line for path, text in found.items() for line in _lines(tree, path, text)))
    return config


def origins(config: BaseModel, tree: Tree) -> dict[str, str]:
    """For each place in the resolved config what set it: file:line, `override`, a preset, or `default`."""
    return {path: tree.origins.get(path, "default") for path in paths(config.model_dump(mode="json"))}


def known_paths(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted path that a config class understands; `*` stands for the index of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, info in annotation.model_fields.items():
            yield prefix + name
            yield from known_paths(info.annotation, f"{prefix}{name}.")
    container = typing.get_origin(annotation)
    for argument in typing.get_args(annotation) if container is not dict else ():
        yield from known_paths(argument, f"{prefix}*." if container in (list, tuple) else prefix)


def resolved_yaml(config: FrozenConfig, provenance: Provenance | None = None) -> str:
    """The complete YAML of a config; with a provenance each value says where it came from."""
    return to_yaml(config.model_dump(mode="json"), provenance.origins if provenance else None)


def json_schema(stage: str) -> dict[str, Any]:
    """JSON Schema of a stage's file, for editors.

    Raises:
        UserError: unknown stage.
    """
    schema = _stage_class(stage, f"config schema {stage}").model_json_schema()
    preset = {
        "type": "object",
        "properties": {"preset": {"enum": list(PRESETS), "type": "string"}},
        "required": ["preset"],
    }
    schema["required"].remove("model")  # init_from may say it
    schema["properties"]["model"] = {"anyOf": [preset, schema["properties"]["model"], {"type": "null"}]}
    return schema


def check_vocabulary(config: RunConfig, tokenizer_size: int) -> None:
    """Once the tokenizer is open: every id that it makes needs a row of the embedding.

    Raises:
        UserError: the tokenizer has more pieces than model.vocab_size.
    """
    if tokenizer_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer_size} pieces and model.vocab_size is {config.model.vocab_size}: "
            f"set model.vocab_size to at least {tokenizer_size}, or use another tokenizer"
        )


def _checked(tree: Tree, where: str, command: str | None) -> RunConfig:
    stage = tree.values.get("stage")
    if stage is None:
        raise UserError(f"{where} names no stage: write `stage: {command or 'pretrain'}`")
    config_class = _stage_class(stage, where)
    if command is not None and stage != command:
        raise UserError(f"{where} is a {stage} file: run `{stage} {where}`, not `{command}`")
    problems = {**_expand_preset(tree), **take_shape(tree), **take_adapter(tree)}
    tree.values = config_class.settle(tree.values)
    return validate(config_class, tree, problems=problems, also_known=("model.preset",))


def _stage_class(stage: Any, where: str) -> type[RunConfig]:
    if isinstance(stage, str) and stage in STAGES:
        return STAGES[stage]
    hint = did_you_mean(stage, STAGES)
    raise UserError(f"{where}: stage {stage!r} is unknown: known are {', '.join(STAGES)}{hint}")


def _expand_preset(tree: Tree) -> dict[str, str]:
    """Put the preset's fields into the tree, so that their origin can be shown. Returns problems by path."""
    model = tree.values.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return {}
    name = model["preset"]
    if name is not None and str(name) not in PRESETS:
        # another stands in, so that the other problems of the file can be found too
        tree.values["model"] = {**PRESETS["tiny"], **model}
        return {"model.preset": f"unknown preset: known are {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}"}
    fields = {} if name is None else PRESETS[name]
    tree.origins |= {f"model.{key}": f"preset {name}" for key in fields if key not in model}
    tree.values["model"] = {**fields, **{key: value for key, value in model.items() if key != "preset"}}
    return {}


def _whole_numbers(value: Any) -> Any:
    """`1e6` as 1000000: strict validation takes no float for a whole number, but whole numbers for floats."""
    if isinstance(value, dict):
        return {key: _whole_numbers(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lines(tree: Tree, path: str, text: str) -> Iterator[str]:
    """`a.b = 3 (file.yaml:7): text`, without the value where there is none or it is a whole section.

    A text across fields may have several lines; each ends with the places of the values that it names. What is
    missing has the place of its section.
    """
    found, value = tree.find(path)
    shown = f" = {show(value)}" if found and not isinstance(value, dict) else ""
    origin = f" ({tree.origins[path]})" if path in tree.origins else ""
    for line in text.splitlines():
        named = [f"{path}.{word}".removeprefix(".") for word in re.findall(r"[\w.]*\w", line)]
        places = [tree.origins[p] for p in named if p in tree.origins and not isinstance(tree.find(p)[1], dict)]
        if not found and (section := path.rpartition(".")[0]) in tree.origins:
            places.append(tree.origins[section])
        where = f" [{', '.join(dict.fromkeys(places))}]" if places else ""
        yield f"{path}{shown}{origin}: {line}{where}" if path else line + where


def _sentences(error: ValidationError, tree: Tree, known: list[str]) -> Iterator[tuple[str, str]]:
    """(dotted path, what is wrong there); alternatives of a union in one sentence."""
    found: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        path = ".".join(_keys(tree.values, detail))
        unknown = detail["type"] == "extra_forbidden"
        text = f"unknown key; {_nearest(path, known)}" if unknown else _sentence(detail)
        found.setdefault(path, []).append(text)
    for path, texts in found.items():
        if not any(other.startswith(f"{path}.") for other in found):  # else its parts are wrong, and said so
            first, *others = dict.fromkeys(texts)
            yield path, " or ".join([first, *(t.removeprefix("must be ").removesuffix(", not text") for t in others)])


def _keys(values: Any, detail: Any) -> Iterator[str]:
    """Pydantic's location without the names of union branches, which are no keys of the file."""
    location: Any = detail["loc"]
    for part in location:
        if (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int)):
            values = values[part]
            yield str(part)
    if detail["type"] == "missing":
        yield location[-1]


def _sentence(detail: Any) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return "missing: this key has no default"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "literal_error":
        known = re.findall(r"'(.*?)'", detail["ctx"]["expected"])
        return f"must be {detail['ctx']['expected']}{did_you_mean(value, known)}"
    if kind == "int_type" and isinstance(value, float):
        return "must be a whole number, got a number with a fractional part"
    if kind not in _MUST_BE:
        return re.sub(r"^.*? should ", "must ", detail["msg"]).replace(" after validation", "")
    is_text = isinstance(value, str) and kind in ("int_type", "float_type", "bool_type")
    return f"must be {_MUST_BE[kind]}{', not text' if is_text else ''}"


def _nearest(path: str, known: list[str]) -> str:
    section, _, word = path.rpartition(".")
    if word in SYNONYMS:
        return f"here that is {SYNONYMS[word]}"
    index = next((part for part in path.split(".") if part.isdigit()), "0")
    known = [p.replace("*", index) for p in known]
    near = closest(path, known)
    if near:
        return f"the nearest key is {near}"
    names = [p.rpartition(".")[2] for p in known if p.rpartition(".")[0] == section]
    return f"the keys {f'of {section}' if section else 'here'} are {', '.join(dict.fromkeys(names))}"


def closest(word: str, known: Sequence[str]) -> str | None:
    """The known dotted path whose last part is most similar, or None; among equals the nearest as a whole."""
    last = {path: path.rpartition(".")[2] for path in known}
    near = difflib.get_close_matches(word.rpartition(".")[2], last.values(), n=1)
    alike = [path for path in known if last[path] in near]
    return max(alike, key=lambda path: difflib.SequenceMatcher(None, word, path).ratio(), default=None)
