"""Text in, text out: texts and chats through a tokenizer to a model, and its tokens back to text."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mixtral_jax.data.text import Tokenizer, control_words, encode_prompt, load_template
from mixtral_jax.generation import Prompts
from mixtral_jax.generation import generate as generate_tokens
from mixtral_jax.generation import stream as stream_tokens
from mixtral_jax.model import Mixtral
from mixtral_jax.train.errors import UserError

Chat = Sequence[Mapping[str, Any]]  # {"role", "content"} each


def generate(
    model: Mixtral,
    prompt: Prompts | str | Chat | Sequence[str | Chat],
    *,
    tokenizer: Tokenizer | None = None,
    template: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Continue token ids or text, or answer a chat.

    Args:
        prompt: token ids (a prompt, a list of prompts, an array), a text, a chat, or a list of texts or chats.
        tokenizer: of texts and chats; `load_tokenizer` reads one.
        template: format of chats: v1, v3, chatml, zephyr, llama3 or a description; None: that of the tokenizer's
            directory, else by its control tokens.
        options: of `mixtral_jax.generation.engine.generate`: max_new_tokens, temperature, top_k, top_p, seed.

    Returns:
        For token ids the new ones, as that function does. What follows a text, the answer to a chat; a list for a list.

    Raises:
        UserError: text without a tokenizer, or one with more pieces than the model knows.
        ValueError: the chat breaks a rule of its template, the template is not known, or an option is out of range.
    """
    single = isinstance(prompt, str) or _is_chat(prompt)
    prompts: Any = [prompt] if single else prompt
    if not isinstance(prompts, list | tuple) or not any(isinstance(p, str) or _is_chat(p) for p in prompts):
        return generate_tokens(model, prompts, **options)
    texts = Codec(model, tokenizer, template, prompts).generate(model, prompts, **options)
    return texts[0] if single else texts


def behind(tokenizer: Tokenizer, lead: Sequence[int], tokens: Iterable[int]) -> str:
    """Text behind that of `lead`, with the leading space that shows only after others."""
    return tokenizer.decode([*lead, *tokens])[len(tokenizer.decode(lead)) :]


def grow(tokenizer: Tokenizer, lead: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The same, token by token; a character of several tokens comes when it is complete."""
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


class Codec:
    """Prompts to token ids and back: a tokenizer, and the template where a prompt is a chat.

    `ends` are the ids that end a text: EOS, those of generation_config.json, and what ends an answer.

    Raises:
        UserError, ValueError: as `generate`.
    """

    def __init__(self, model: Mixtral, tokenizer: Tokenizer | None, template: Any, prompts: Sequence[str | Chat]):
        """`prompts`: what will be encoded, or some of it: whether there are chats, and what is warned of."""
        if tokenizer is None:
            raise UserError("text needs a tokenizer: generate(..., tokenizer=load_tokenizer(path)), or give token ids")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the model knows {model.config.vocab_size}"
            )
        self._tokenizer, self._template = tokenizer, None
        ends = [tokenizer.eos_id, *(end for end in tokenizer.ends if end < model.config.vocab_size)]
        if any(map(_is_chat, prompts)):
            self._template = load_template(template, tokenizer)
            close = self._template.answer_end
            ends += close if len(close) == 1 else ()
        self.ends = list(dict.fromkeys(ends))
        self.warn_of_control_words(prompts)

    def encode(self, prompt: str | Chat, tools: Sequence[Any] = ()) -> list[int]:
        """BOS and the text, or the chat, with its tools, up to the header of its answer."""
        if isinstance(prompt, str):
            return [self._tokenizer.bos_id, *self._tokenizer.encode(prompt)]
        assert self._template is not None
        return encode_prompt(prompt, self._template, tools=tools)

    def warn_of_control_words(self, prompts: Sequence[str | Chat]) -> None:
        """Whether they hold what looks like a mark of the template."""
        typed: list[str] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                typed += [word for word in control_words(prompt) if word in self._tokenizer.controls]
            elif self._template is not None:
                contents = [m.get("content") for m in prompt if isinstance(m, Mapping)]
                typed += [w for text in contents if isinstance(text, str) for w in self._template.words.findall(text)]
        if typed:
            warnings.warn(
                f"the prompts hold {', '.join(dict.fromkeys(typed))} ({len(typed)} in all) as text, which is encoded "
                "as letters: BOS and the marks of a chat are put there by themselves",
                stacklevel=3,
            )

    def generate(self, model: Mixtral, prompts: Sequence[str | Chat], **options: Any) -> list[str]:
        """What follows each prompt."""
        ids = [self.encode(prompt) for prompt in prompts]
        answers = generate_tokens(model, ids, **{"eos_id": self.ends, **options})
        return [self.text(*each) for each in zip(prompts, ids, answers, strict=True)]

    def stream(self, model: Mixtral, prompt: str | Chat, **options: Any) -> Iterator[str]:
        """The same of one prompt, piece by piece as it grows."""
        ids = self.encode(prompt)
        rows = stream_tokens(model, [ids], **{"eos_id": self.ends, **options})
        return self.grow(prompt, ids, (token for (token,) in rows if token is not None))

    def finish(self, new: Sequence[int]) -> str:
        """`stop` where the model ended the text, `length` where it was cut."""
        return "stop" if new[-1] in self.ends else "length"

    def text(self, prompt: str | Chat, ids: Sequence[int], new: Iterable[int]) -> str:
        """The new tokens as text."""
        return behind(self._tokenizer, *self._parts(prompt, ids, new))

    def grow(self, prompt: str | Chat, ids: Sequence[int], new: Iterable[int]) -> Iterator[str]:
        """The same, piece by piece."""
        return grow(self._tokenizer, *self._parts(prompt, ids, new))

    def _parts(self, prompt: str | Chat, ids: Sequence[int], new: Iterable[int]) -> tuple[Sequence[int], Iterable[int]]:
        """What stands before the text; its tokens, not what ends it."""
        return (ids[1:] if isinstance(prompt, str) else []), (token for token in new if token not in self.ends)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)
