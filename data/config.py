"""What a run reads: sources, tokenizer, packing, mixture. Paths are relative to the working directory."""

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class FrozenConfig(BaseModel):
    """Immutable and strict about unknown keys (the data room knows nothing of the model's room)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_place_name(place: str) -> str:
    """The name of a directory that is written to, as it stands.

    Raises:
        ValueError: a shell would have read another name there, or an address lacks a slash.
    """
    if place.startswith("~") or "$" in place:
        raise ValueError("is taken as it stands, without a shell's ~ and $NAME: write the whole path")
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", place):
        raise ValueError("is neither a path nor an address: an address has two slashes behind the colon")
    return place


class SourceConfig(FrozenConfig):
    """One named collection of records."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the source in every metric")
    path: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="file, directory, glob or fsspec address, or a list of them"
    )
    weight: float | None = Field(
        None, gt=0, description="share of the rows, relative to the other sources; null: by size"
    )
    format: Literal["auto", "jsonl", "parquet", "text", "array_record", "tfds", "datasets"] = Field(
        "auto", description="auto: by the file's extension, or by what the directory holds"
    )
    layout: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "kto", "alpaca",
        "preference", "implicit", "ultrafeedback", "hh",
    ] = Field("auto", description="how a row holds a chat or a pair; auto: as a file's first rows show")  # fmt: skip
    split: str | None = Field(None, description="split of a data set: TFDS, Hugging Face, a clone of the hub")
    text_key: str = Field("text", description="column of the text of a document; no text: the only one of strings")
    messages_key: str = Field("messages", description="column of a chat")
    prompt_key: str = Field("prompt", description="column of the question of a prompt-completion pair or a preference")
    completion_key: str = Field("completion", description="column of the answer to it")
    chosen_key: str = Field("chosen", description="column of the preferred answer")
    rejected_key: str = Field("rejected", description="column of the rejected answer")

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path


class PhaseRateConfig(FrozenConfig):
    """A phase's part of the learning-rate schedule: from the rate at its beginning to a fraction at its end.

    The end is the next phase that has a part, or the last step. Of d, the done share of the part, the way from the
    first rate to the last is gone by d (linear), (1 - cos(pi d)) / 2 (cosine), sqrt(d) (sqrt: 1-sqrt of 2405.18392) or
    not at all (constant). From its first step on a part stands in the place of `optimizer.schedule`, which until then
    is that of the whole run; `wsd` has no decay of its own beside parts.
    """

    schedule: Literal["linear", "cosine", "sqrt", "constant"] = Field("linear", description="the shape of the way")
    final_fraction: float | None = Field(
        None, ge=0, le=1, description="rate at the phase's end, as a fraction of optimizer.learning_rate; null: 0"
    )

    @model_validator(mode="after")
    def _constant_has_no_end(self) -> Self:
        if self.schedule == "constant" and self.final_fraction is not None:
            raise ValueError(f"final_fraction ({self.final_fraction:g}) means nothing with schedule: constant")
        return self


class PhaseConfig(FrozenConfig):
    """A stretch of the run with a mixture of its own; each source goes on where it stood."""

    from_step: int = Field(ge=0, description="its first batch is the one behind so many updates; 0 in the first phase")
    weights: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = Field(
        None, description="share of the rows by source, relative to the others; sources not named are not read; "
        "null: all, by size",
    )  # fmt: skip
    temperature: float | None = Field(None, gt=0, description="data.temperature's meaning, in this phase")
    learning_rate: PhaseRateConfig | None = Field(
        None, description="this phase's part of the schedule; null: what came before goes on"
    )


_INSTEAD = {
    "weight": "write it as phases.0.weights",
    "temperature": "write it as phases.0.temperature",
    "epochs": "phases begin at steps, so say how long the run is by steps",
}


class DataConfig(FrozenConfig):
    """The sources of a run and how they become rows."""

    tokenizer: str = Field(description="SentencePiece model, tokenizer.json, or a directory that holds one of them")
    train: tuple[SourceConfig, ...] = Field(min_length=1, description="what is learned from")
    validation: tuple[SourceConfig, ...] = Field((), description="what the loss is measured on")
    examples: Literal["text", "chat", "preference"] = Field(
        "text",
        description="text: documents, every token learned; chat: only answers are learned; preference: pairs of them",
    )
    template: str | dict[str, Any] | None = Field(
        None,
        description="chat format: v1, v3 (Mistral instruct), chatml, zephyr, llama3, or a description; "
        "null: that of the tokenizer's directory, else what its control tokens mean, else v1",
    )
    train_on: Literal["all", "last"] = Field("all", description="of a chat all answers are learned, or the last")
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="concat cuts documents at row ends, best_fit only those longer than a row"
    )
    pairs_per_row: int = Field(1, gt=0, description="preference pairs that may share a row of seq_len positions")
    temperature: float | None = Field(
        None, gt=0, description="rows of a source are drawn in proportion to (weight * rows)^(1 / temperature)"
    )
    phases: Annotated[tuple[PhaseConfig, ...], Field(min_length=1)] | None = Field(
        None, description="stretches of the run, each with its mixture; null: one, by the sources' weights"
    )
    epochs: float | None = Field(None, gt=0, description="length of the run in passes over the data, instead of steps")
    cache_dir: str = Field(".cache/mixtral-jax", description="where prepared rows are kept")
    on_error: Literal["fail", "skip"] = Field("fail", description="skip: count bad records, show the first few")
    workers: int = Field(0, ge=0, description="processes that tokenise; 0: one a core")
    restart: bool = Field(
        False,
        description="go on although mixture or data changed: sources where they stood, changed rows from their first",
    )

    @field_validator("cache_dir")
    @classmethod
    def _is_of_a_file_system(cls, place: str) -> str:
        if "://" in place:
            raise ValueError("must be a directory of a file system: rows are read from it at random")
        return check_place_name(place)

    @field_validator("train", "validation")
    @classmethod
    def _names_differ(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}: each needs its own name")
        return sources

    @model_validator(mode="after")
    def _layouts_fit(self) -> Self:
        pairs = ("preference", "implicit", "ultrafeedback", "hh")
        for source in self.train + self.validation:
            of_pairs = "preference" if source.layout in pairs else "chat"
            if source.layout != "auto" and self.examples != of_pairs:
                raise ValueError(
                    f"source {source.name!r} has layout {source.layout}, which is of examples: {of_pairs}, "
                    f"and data.examples is {self.examples}"
                )
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if problems := "\n".join(self._phase_problems()):
            raise ValueError(problems)
        return self

    def _phase_problems(self) -> Iterator[str]:
        phases, names = self.phases or (), [source.name for source in self.train]
        weighted = {f"train.{i}.weight": source.weight for i, source in enumerate(self.train)}
        for key, value in {**weighted, "temperature": self.temperature, "epochs": self.epochs}.items():
            if phases and value is not None:
                yield f"{key} ({value:g}) beside phases: {_INSTEAD[key.rpartition('.')[2]]}"
        for i, phase in enumerate(phases):
            least = phases[i - 1].from_step + 1 if i else 0
            if phase.from_step < least or (i == 0 and phase.from_step):
                where = f"behind phases.{i - 1}.from_step ({least - 1})" if i else "at step 0"
                yield f"phases.{i}.from_step ({phase.from_step}) must lie {where}"
            for name in phase.weights or ():
                if name not in names:
                    near = difflib.get_close_matches(name, names, 1, 0) or names
                    yield f"phases.{i}.weights names {name!r}, which is no source of train: the nearest is {near[0]!r}"
        if phases and phases[0].learning_rate is not None:
            yield "phases.0.learning_rate: the first phase has the schedule of optimizer.schedule, remove it"
        read = {name for phase in phases for name in phase.weights or names}
        if phases and read <= {*names} and (unread := [name for name in names if name not in read]):
            yield f"phases read no {' and no '.join(unread)}: give each source a weight in one, or remove it from train"

    def phases_in(self, steps: int, warmup_steps: int, decay_steps: int | None) -> Iterator[str]:
        """What is wrong with the phases in a run of so many steps, with such a schedule."""
        for i, phase in enumerate(self.phases or ()):
            begin = f"data.phases.{i}.from_step ({phase.from_step})"
            if phase.from_step >= steps:
                yield f"{begin} is not smaller than steps ({steps})"
            if phase.learning_rate is not None and phase.from_step < warmup_steps:
                yield f"{begin} begins a part of the schedule within optimizer.warmup_steps ({warmup_steps})"
            if phase.learning_rate is not None and decay_steps is not None:
                own = f"optimizer.decay_steps ({decay_steps}) is wsd's own decay"
                yield f"{own}, and data.phases.{i}.learning_rate stands in its place: remove one of them"

    @property
    def mixed(self) -> tuple[PhaseConfig, ...]:
        """The phases; where none are named the one that the sources' weights mean."""
        if self.phases is not None:
            return self.phases
        weights = {source.name: source.weight or 1.0 for source in self.train}
        named = any(source.weight is not None for source in self.train)
        return (PhaseConfig(from_step=0, weights=weights if named else None, temperature=self.temperature),)

    @model_validator(mode="after")
    def _weights_are_complete(self) -> Self:
        named = [source.name for source in self.train if source.weight is not None]
        if named and self.temperature is None and len(named) < len(self.train):
            missing = next(source.name for source in self.train if source.weight is None)
            raise ValueError(
                f"source {missing!r} has no weight while {named[0]!r} has one: give every source a weight, or none"
            )
        return self
