"""What a run file leaves to the checkpoint or the run that it names: the model's shape, an adapter's sizes."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mixtral_jax.config import PRESETS, MixtralConfig
from mixtral_jax.train.config.tree import Tree, read_tree


def run_and_step(named: str) -> tuple[str, int | None]:
    """RUN or RUN@STEP, as resume_from has it; an @ may also be a part of the name of what is there."""
    path, _, step = named.rpartition("@")
    return (path, int(step)) if path and step.isdecimal() and not Path(named).exists() else (named, None)


def take_shape(tree: Tree) -> dict[str, str]:
    """`model: null`, or a model without its sizes: what is not given is that of init_from, or of resume_from.

    Returns problems by path.
    """
    key = next((key for key in ("init_from", "resume_from") if tree.values.get(key) is not None), "init_from")
    model, base = tree.values.get("model"), tree.values.get(key)
    given = {} if model is None else model
    sizes = [name for name, field in MixtralConfig.model_fields.items() if field.is_required()]
    if not isinstance(given, dict) or ("model" not in tree.values and base is None) or given.keys() >= {*sizes}:
        return {}
    problems = {"model": "null takes the shape from init_from, which names no checkpoint: set it, or give a model"}
    if isinstance(base, str):
        path = run_and_step(base)[0] if key == "resume_from" else base
        try:
            shape, origin = shape_of(path).model_dump(mode="json"), f"{key} {base}"
        except (ValueError, OSError) as error:
            shape, origin = _as_it_began(tree, key, "model")
            problems = {"model": f"its shape was to be that of {key}, but {error}"}
        if shape:
            tree.origins |= {f"model.{key}": origin for key in shape if key not in given}
            tree.values["model"] = {**shape, **given}
            return {}
    if model is not None and base is None:
        return {}  # what is missing is named one by one
    tree.values["model"] = {**PRESETS["tiny"], **given}  # so that the other problems can be found too
    return problems


def take_adapter(tree: Tree) -> dict[str, str]:
    """What `lora` does not say of the adapter that it begins with. Returns problems by path."""
    lora, model = tree.values.get("lora"), tree.values.get("model")
    if not isinstance(lora, dict) or not isinstance(model, dict) or not isinstance(named := lora.get("init_from"), str):
        return {}
    missing = [key for key in ("rank", "alpha", "rslora", "targets", "modules_to_save") if key not in lora]
    if not missing:
        return {}
    from mixtral_jax.convert import open_adapter  # slow to import, and few files need it

    try:
        own, origin = open_adapter(named, MixtralConfig(**model)).lora.model_dump(mode="json"), f"adapter {named}"
    except (ValueError, OSError) as error:
        own, origin = _as_it_began(tree, "lora.init_from", "lora")
        if not own:
            told = "model is none" if isinstance(error, ValidationError) else error
            return {"lora.init_from": f"rank and scale were to be those of this adapter, but {told}"}
    tree.origins |= {f"lora.{key}": origin for key in missing}
    tree.values["lora"] = lora | {key: own[key] for key in missing}
    return {}


def _as_it_began(tree: Tree, source: str, section: str) -> tuple[dict[str, Any], str]:
    """A section of the run's own config.yaml, and its place, if it began with the same `source`, which is gone now."""
    run = Path(str(tree.values.get("output_dir", "runs")), str(tree.values.get("run_name")))
    file, env = run / "config.yaml", run / "env.json"
    before = read_tree(file) if file.is_file() else Tree()
    known = {before.find(source)[1]}
    if source == "resume_from" and env.is_file() and (trunk := read_tree(env).find("resumed_from")[1]):
        # config.yaml of a fork that stands on a base names that instead
        known |= {trunk["run"], *(f"{trunk['run']}{sign}{trunk['step']}" for sign in "@/")}
    return before.find(section)[1] if tree.find(source)[1] in known - {None} else {}, str(file)


def shape_of(path: str) -> MixtralConfig:
    """The shape of what init_from or resume_from names: a checkpoint of any kind, or a run, by its own file.

    Raises:
        ValueError, OSError: there is nothing, or it is no model.
    """
    file = Path(path) / "config.yaml"
    if file.is_file() and not (Path(path) / "config.json").exists():
        return MixtralConfig(**read_tree(file).values["model"])
    from mixtral_jax.convert import load_config as shape  # slow to import, and few files need it

    return shape(path)
