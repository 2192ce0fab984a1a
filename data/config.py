"""What a run reads: sources, tokenizer, packing, mixture. Paths are relative to the working directory."""

import re
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


class DataConfig(FrozenConfig):
    """The sources of a run and how they become rows."""

    tokenizer: str = Field(
        description="SentencePiece model, tokenizer.json, or a directory with one of them; or its address"
    )
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
    epochs: float | None = Field(None, gt=0, description="length of the run in passes over the data, instead of steps")
    cache_dir: str = Field(".cache/mixtral-jax", description="where prepared rows are kept: a directory or an address")
    staging_dir: str | None = Field(
        None, description="where copies of what lies behind addresses are kept here; null: .cache/mixtral-jax-staging"
    )
    staging_bytes: int | None = Field(
        None, gt=0, description="of such copies at most; null: as many as leave a tenth of the disk free"
    )
    on_error: Literal["fail", "skip"] = Field("fail", description="skip: count bad records, show the first few")
    workers: int = Field(0, ge=0, description="processes that tokenise; 0: one a core")
    restart: bool = Field(False, description="start at row 0 where a checkpoint was made from other data")

    @field_validator("cache_dir")
    @classmethod
    def _is_a_place(cls, place: str) -> str:
        return check_place_name(place.removeprefix("file://"))

    @field_validator("staging_dir")
    @classmethod
    def _is_of_a_file_system(cls, place: str | None) -> str | None:
        if place is not None and "://" in place:
            raise ValueError("must be a directory of this machine: it holds copies of what lies behind addresses")
        return place and check_place_name(place)

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
    def _weights_are_complete(self) -> Self:
        named = [source.name for source in self.train if source.weight is not None]
        if named and self.temperature is None and len(named) < len(self.train):
            missing = next(source.name for source in self.train if source.weight is None)
            raise ValueError(
                f"source {missing!r} has no weight while {named[0]!r} has one: give every source a weight, or none"
            )
        return self
