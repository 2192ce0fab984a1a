"""The formats of chats: what stands around each message, and where the system prompt goes; no tokenizer yet."""

from typing import Any, Literal, Self

from pydantic import model_validator

from mixtral_jax.data.config import FrozenConfig

EOS = "{eos}"  # in `open`, `close` and `after`: the tokenizer's own end-of-sequence token, whatever its piece is called
CONTENT = "{content}"


class TurnFormat(FrozenConfig):
    """One message = `open`, then `text` with the content in it, then `close` and `after`.

    Of an assistant's message, `text` and `close` are trainable; `open` and `after` never are. Generation starts after
    the assistant's `open`.
    """

    open: str = ""
    text: str = CONTENT
    close: str = ""
    after: str = ""

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if self.text.count(CONTENT) != 1:
            raise ValueError(f"text must hold {CONTENT} exactly once, got {self.text!r}")
        return self


class TemplateFormat(FrozenConfig):
    """A template before it meets a tokenizer; the fields are the keys of a template in YAML."""

    name: str = "custom"
    bos: bool = True
    special: tuple[str, ...] = ()  # pieces that stand for one token each in open, close and after
    user: TurnFormat
    assistant: TurnFormat
    tool: TurnFormat | None = None
    system: TurnFormat | Literal["first_user", "last_user", "refuse"] = "refuse"
    system_separator: str = "\n\n"  # between the system prompt and the user turn that it is put in front of
    strip_answer: bool = False  # drop trailing spaces of an answer, as Mistral's v3 does
    trim: Literal["none", "answers", "all"] = "none"  # drop white space on both sides of contents, as Llama 3 does
    tool_calls: Literal["refuse", "mistral-v3"] = "refuse"
    spaces: bool = False  # with tokenizers that put a space in front of texts, every message begins with one

    def stripped(self, role: str, content: str) -> str:
        """What of a content is written."""
        if self.trim == "all" or (self.trim == "answers" and role == "assistant"):
            content = content.strip()
        return content.rstrip(" ") if self.strip_answer and role == "assistant" else content

    @model_validator(mode="after")
    def _answers_end(self) -> Self:
        if not self.assistant.close:
            raise ValueError(f"assistant.close is empty: an answer needs a last token, such as {EOS}")
        return self


V1 = TemplateFormat(
    name="v1",
    user=TurnFormat(text="[INST] {content} [/INST]"),
    assistant=TurnFormat(close=EOS),
    system="first_user",
    spaces=True,
)
V3 = TemplateFormat(
    name="v3",
    special=("[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    user=TurnFormat(open="[INST]", close="[/INST]"),
    assistant=TurnFormat(close=EOS),
    tool=TurnFormat(open="[TOOL_RESULTS]", close="[/TOOL_RESULTS]"),
    system="last_user",
    strip_answer=True,
    tool_calls="mistral-v3",
    spaces=True,
)


def _headed(name: str, header: str, end: str, **more: Any) -> TemplateFormat:
    """A template in which each message has a header with its role in the place of %s."""
    roles = {"system": "system", "user": "user", "tool": "tool", "assistant": "assistant"} | more.pop("roles", {})
    after = more.pop("after", "")
    turns = {role: TurnFormat(open=header % word, close=end, after=after) for role, word in roles.items() if word}
    return TemplateFormat(name=name, **turns, **more)


CHATML = _headed(
    "chatml", "<|im_start|>%s\n", "<|im_end|>", after="\n", bos=False, special=("<|im_start|>", "<|im_end|>")
)
ZEPHYR = _headed("zephyr", "<|%s|>\n", EOS, after="\n", bos=False, roles={"tool": None})
LLAMA3 = _headed(
    "llama3",
    "<|start_header_id|>%s<|end_header_id|>\n\n",
    "<|eot_id|>",
    roles={"tool": "ipython"},
    special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    trim="all",
)
BUILT_IN = {"v1": V1, "v3": V3, "chatml": CHATML, "zephyr": ZEPHYR, "llama3": LLAMA3}
TOOL_TOKENS = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")  # of v3


def with_space(turn: TurnFormat, space: str = " ") -> TurnFormat:
    """The turn whose text begins with this and no other space."""
    return turn.model_copy(update={"text": space + turn.text.removeprefix(" ")})
