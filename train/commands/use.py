"""What needs both a tokenizer and a model: `generate` and `eval`."""

import contextlib
import functools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.config import ComputeConfig
from mixtral_jax.data.loader import eval_sources
from mixtral_jax.data.prepare.prepare import prepare
from mixtral_jax.data.text.chat import encode_prompt
from mixtral_jax.data.text.template import Template, load_template
from mixtral_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.generation.generate import generate as generate_tokens
from mixtral_jax.generation.generate import stream
from mixtral_jax.model import Mixtral, compute_dtype
from mixtral_jax.parallel.mesh import make_mesh
from mixtral_jax.train.commands.read_model import read_model, run_config
from mixtral_jax.train.config.schema import RunConfig, check_sizes
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.feed import batch_share, make_put
from mixtral_jax.train.hooks.evaluate import add_up, token_metrics
from mixtral_jax.train.objective import token_sums
from mixtral_jax.train.run.peers import agree

EXIT_DONE, EXIT_NOT_FINITE = 0, 3
_TOKENIZERS = ("*.model", "*.model.v*", "tokenizer.json")


def generate(
    checkpoint: str,
    *,
    prompts: Sequence[str] | None = None,
    chat: bool = False,
    template: str | None = None,
    tokenizer: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Any = None,
) -> int:
    """Print continuations of prompts, or answers to them as a user's messages. One prompt appears as it is written.

    Args:
        checkpoint: an Orbax or Hugging Face directory, a run, or one of its steps.
        prompts: None: standard input is one prompt; typed by hand in a chat, each line is a turn.
        template: chat format; None: that of the run, else by the tokenizer's control tokens.
        tokenizer: None: that in the directory, else that of the run.

    Raises:
        UserError: no tokenizer is found, or it does not fit the model.
    """
    run = run_config(checkpoint)
    codec = _tokenizer(checkpoint, tokenizer, run)
    compute = ComputeConfig(dtype=dtype or "auto")
    whole = compute_dtype(compute.dtype) == "float32"  # cast once; lower precisions keep the router as it is on disk
    model = read_model(checkpoint, dtype="float32" if whole else None, compute=compute)
    if codec.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {codec.vocab_size} pieces, the model of {checkpoint} knows {model.config.vocab_size}"
        )
    form = load_template(template or _usual_template(codec, run), codec) if chat else None
    writer = _Writer(model, codec, form, dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ))  # fmt: skip
    if prompts is None and form is not None and sys.stdin.isatty():
        writer.converse()
        return EXIT_DONE
    texts = [sys.stdin.read().rstrip("\n")] if prompts is None else list(prompts)
    if len(texts) == 1:
        writer.write_one(texts[0])
    else:
        writer.write_all(texts)
    return EXIT_DONE


class _Writer:
    """Text in, text out."""

    def __init__(self, model: Mixtral, tokenizer: Tokenizer, template: Template | None, options: dict[str, Any]):
        self._model, self._tokenizer, self._template = model, tokenizer, template
        ends = [tokenizer.eos_id]
        if template is not None and len(template.assistant.close) == 1:
            ends.append(template.assistant.close[0])
        self._ends, self._options = list(dict.fromkeys(ends)), options

    def write_one(self, text: str) -> None:
        """Print a prompt (unless it is a chat's) and its continuation as it grows."""
        if self._template is None:
            print(text, end="", flush=True)
        self._write(self._ids([{"role": "user", "content": text}]))

    def write_all(self, texts: Sequence[str]) -> None:
        """Print prompts and their continuations, computed as one batch."""
        ids = [self._ids([{"role": "user", "content": text}]) for text in texts]
        answers = generate_tokens(self._model, ids, eos_id=self._ends, **self._options)
        for number, (text, answer) in enumerate(zip(texts, answers, strict=True), 1):
            joint = "\n" if self._template is not None else ""
            print(f"--- {number} ---\n{text}{joint}{self._tokenizer.decode(self._visible(answer))}")

    def converse(self) -> None:
        """Turns typed by hand, until the end of input."""
        messages: list[dict[str, str]] = []
        with contextlib.suppress(EOFError):
            while True:
                messages.append({"role": "user", "content": input("> ")})
                answer = self._write(self._ids(messages))
                if not answer.strip():  # an empty answer cannot stand in a conversation
                    messages.pop()
                    continue
                messages.append({"role": "assistant", "content": answer})

    def _ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self._template is not None:
            return encode_prompt(messages, self._tokenizer, self._template)
        return [self._tokenizer.bos_id, *self._tokenizer.encode(messages[-1]["content"])]

    def _write(self, ids: list[int]) -> str:
        written = ""
        new = (
            int(row[0]) for row in stream(self._model, [ids], eos_id=self._ends, **self._options) if row[0] is not None
        )
        lead = () if self._template is not None else tuple(ids[1:])  # a piece's leading space shows only after others
        for text in grow(self._tokenizer, lead, (token for token in new if token not in self._ends)):
            print(text, end="", flush=True)
            written += text
        print(flush=True)
        return written

    def _visible(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token not in self._ends]


def grow(tokenizer: Tokenizer, lead: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """Text behind that of `lead`, token by token; a character of several tokens comes when it is complete."""
    ids = list(lead)
    shown = len(tokenizer.decode(ids))
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]


def evaluate(checkpoint: str, config: RunConfig, *, as_json: bool = False) -> int:
    """Print loss, perplexity, bits per byte and accuracy of each validation source; 3 where a loss is not finite.

    Raises:
        UserError: as `measure`.
    """
    metrics = measure(checkpoint, config)
    if jax.process_index() == 0:
        names = [source.name for source in config.data.validation]
        print(json.dumps({"checkpoint": checkpoint, **metrics}) if as_json else _table(metrics, names))
    if not math.isfinite(metrics["eval/loss"]):
        print("exit 3: the loss is not finite", file=sys.stderr)
        return EXIT_NOT_FINITE
    return EXIT_DONE


def measure(checkpoint: str, config: RunConfig) -> dict[str, float]:
    """eval/{loss,perplexity,bits_per_byte,accuracy} over the validation sources of a run file, and eval/<source>/*.

    Raises:
        UserError: the file is one for preferences, has no validation sources, or its tokenizer does not fit the model.
    """
    data: Any = getattr(config, "data", None)
    if config.stage == "dpo":
        raise UserError("eval reads files with stage pretrain or sft: a preference file has pairs, not documents")
    if not data.validation:
        raise UserError("data.validation is empty: there is nothing to evaluate")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        model = read_model(checkpoint, mesh=mesh, compute=config.compute)
        pieces = load_tokenizer(data.tokenizer).vocab_size
        if pieces > model.config.vocab_size:
            raise UserError(
                f"data.tokenizer has {pieces} pieces, the model of {checkpoint} knows {model.config.vocab_size}"
            )
        if mesh is not None:
            check_sizes(config, mesh.shape, training=False)
        rows = config.eval.batch_size or config.rows_per_micro_batch
        share = batch_share(mesh, rows)
        sources = eval_sources(prepare(data, config.seq_len, config.seed, train=False), batch_size=rows, shard=share)
        put = make_put(mesh, share)
        agree(validation=" ".join(source.fingerprint for source in sources.values()))

        def ask(batch: Any) -> Any:
            return _sums(model, put(batch), skip_masked=config.stage == "sft")

        sums = {name: add_up(ask, source, config.eval.batches) for name, source in sources.items()}
    return token_metrics(sums, sources)


@functools.partial(jax.jit, static_argnames="skip_masked")
def _sums(model: Mixtral, batch: Any, skip_masked: bool) -> Any:
    return token_sums(model, jax.tree.map(lambda x: x[0], batch), skip_masked=skip_masked)[0]


def _table(metrics: dict[str, float], sources: Sequence[str]) -> str:
    names = ("loss", "perplexity", "bits_per_byte", "accuracy")
    width = max(len("source"), *map(len, sources), len("all"))
    lines = [f"{'source':{width}}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}  {'accuracy':>8}"]
    for label, prefix in [*((name, f"eval/{name}/") for name in sources), ("all", "eval/")]:
        loss, perplexity, bits, accuracy = (metrics.get(prefix + name, math.nan) for name in names)
        lines.append(f"{label:{width}}  {loss:8.4f}  {perplexity:10.3f}  {bits:9.4f}  {accuracy:8.4f}")
    return "\n".join(lines)


def _tokenizer(checkpoint: str, given: str | None, run: RunConfig | None) -> Tokenizer:
    if given is not None:
        return load_tokenizer(given)
    if any(next(Path(checkpoint).glob(pattern), None) for pattern in _TOKENIZERS):
        return load_tokenizer(checkpoint)
    if run is None:
        raise UserError(f"{checkpoint} holds no tokenizer: name one with --tokenizer")
    data: Any = getattr(run, "data", None)
    return load_tokenizer(data.tokenizer)


def _usual_template(tokenizer: Tokenizer, run: RunConfig | None) -> Any:
    data: Any = getattr(run, "data", None)
    if run is not None and run.stage != "pretrain":
        return data.template
    if tokenizer.id_of("<|im_start|>") is not None:
        return "chatml"
    return "v1" if tokenizer.id_of("[INST]") is None else "v3"
