"""Our models as lm-evaluation-harness knows models: its requests as token ids, and the answers to them.

Texts are cut into tokens as the harness's own `hf` model does it, so that one checkpoint gets the same requests from
both. A chat is never written out and read again: what the harness takes for its text is its messages as JSON, which
become ids by our own templates.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import GenKwargs, normalize_gen_kwargs, postprocess_generated_text

from mixtral_jax.data.text import Tokenizer, begins_with_bos, encode_begun, encode_prompt, load_template
from mixtral_jax.generation import stream
from mixtral_jax.model import Mixtral
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.evals.scoring import Continuation, score
from mixtral_jax.train.text import Codec, behind

ROWS = 32  # prompts that are continued at once
_BEAT = 16  # tokens of theirs after which the meter hears of it


class Asked(NamedTuple):
    """What is to be continued, and how."""

    ids: list[int]
    lead: list[int]  # what the text of the answer goes on from: of a chat BOS, unless its last answer is begun
    how: GenKwargs


def check_room(task: str, how: dict[str, Any], longest: int) -> None:
    """Whether a task that writes leaves room for a prompt in the `longest` tokens that the model reads.

    Raises:
        UserError: it does not.
    """
    if (most := normalize_gen_kwargs(how, HarnessModel.max_gen_toks)["max_gen_toks"]) >= longest:
        raise UserError(f"task {task} writes {most} tokens, no room for a prompt: the model reads {longest}")


class Chat(str):
    """Messages as JSON, where the harness expects text; the last may be an answer that is only begun."""

    @property
    def messages(self) -> list[dict[str, str]]:
        return json.loads(self)


class HarnessModel(TemplateLM):
    """A model, its tokenizer and its chat format. Every process of a mesh makes the same calls and has all answers."""

    backend = "causal"
    max_gen_toks = 256  # where a task does not say

    def __init__(self, model: Mixtral, tokenizer: Tokenizer, template: Any, meter: Callable[..., Any]):
        """`template`: of chats, see `load_template`; `meter`: see benchmarks."""
        super().__init__()
        self._model, self._tokenizer, self._template, self._meter = model, tokenizer, template, meter
        self._bos = [tokenizer.bos_id] if begins_with_bos(tokenizer) else []
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    # ---- text and chats to ids

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """BOS where transformers would put one, unless told, or the text has it already; of a Chat its template's."""
        if isinstance(string, Chat):
            return self._encode_chat(string.messages)
        bos = self._tokenizer.piece_of(self._tokenizer.bos_id)
        if add_special_tokens is None and string.startswith(bos):
            return [self._tokenizer.bos_id, *self._tokenizer.encode(string.removeprefix(bos))]
        before = {None: self._bos, True: [self._tokenizer.bos_id], False: []}[add_special_tokens]
        return before + self._tokenizer.encode(string)

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        template = load_template(self._template, self._tokenizer)
        return (encode_begun if messages[-1]["role"] == "assistant" else encode_prompt)(messages, template)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not isinstance(context, Chat):
            return super()._encode_pair(context, continuation)
        messages, begun = context.messages, ""
        if messages[-1]["role"] == "assistant":
            begun = messages.pop()["content"]
        stripped = begun.rstrip()
        before = [*messages, {"role": "assistant", "content": stripped}] if stripped else messages
        whole = self._encode_chat([*messages, {"role": "assistant", "content": begun + continuation}])
        n = len(self._encode_chat(before))
        return whole[:n], whole[n:]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """`add_generation_prompt` is False where the last message is an answer that is only begun."""
        return Chat(json.dumps(chat_history, ensure_ascii=False))

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint()

    # ---- what the harness asks

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        asked = [Continuation(context, tokens) for _, context, tokens in requests]
        with self._meter("Scoring", sum(len(each.tokens) for each in asked)) as advance:
            scores = score(self._model, asked, longest=self.max_length, advance=advance)
        return [(float(each.logps_T.sum(dtype=float)), bool(each.best_T.all())) for each in scores]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Windows of `max_length` tokens, of which each is asked about once, behind as many as there is room for."""
        windows, ends = [], [0]
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [("", *utils.make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        logps = [logp for logp, _ in self._loglikelihood_tokens(windows)]
        return [sum(logps[a:b]) for a, b in pairwise(ends)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Of each context the text up to a stop string, without it; rows of like lengths, and settings, together."""
        asked = [self._asked(*request.args) for request in requests]
        chats = [context.messages for context, _ in (request.args for request in requests) if isinstance(context, Chat)]
        ends = Codec(self._model, self._tokenizer, self._template, chats[:1]).ends
        order = sorted(range(len(asked)), key=lambda i: (json.dumps(asked[i].how, sort_keys=True), -len(asked[i].ids)))
        texts = [""] * len(asked)
        with self._meter("Generating", len(asked)) as advance:
            while order:
                now = [i for i in order[:ROWS] if asked[i].how == asked[order[0]].how]
                order = order[len(now) :]
                answers = self._continue([asked[i] for i in now], ends, now, advance)
                for i, text in zip(now, answers, strict=True):
                    texts[i] = text
                advance(len(now))
        return texts

    def _asked(self, context: str, how: dict[str, Any]) -> Asked:
        ids = self.tok_encode(context)
        anew = isinstance(context, Chat) and context.messages[-1]["role"] != "assistant"
        return Asked(ids, [self._tokenizer.bos_id] if anew else ids, normalize_gen_kwargs(how, self.max_gen_toks))

    def _continue(
        self, asked: Sequence[Asked], ends: list[int], numbers: Sequence[int], advance: Callable[[int], None]
    ) -> list[str]:
        """What a row says behind its first stop string is not looked at; once all have one they end."""
        how, tokenizer = asked[0].how, self._tokenizer
        room = self.max_length - (most := how["max_gen_toks"])
        drawing = {name: how[name] for name in ("temperature", "top_k", "top_p") if name in how and how["do_sample"]}
        stops = how["until"]
        look = 2 + max((len(stop.encode()) for stop in stops), default=0)  # tokens that hold a stop string, at most
        new: list[list[int]] = [[] for _ in asked]
        going = set(range(len(asked)))
        cut = [each.ids[-room:] for each in asked]
        steps = stream(self._model, cut, max_new_tokens=most, eos_id=ends, numbers=numbers, **drawing)
        for count, tokens in enumerate(steps, 1):
            if count % _BEAT == 0:
                advance(0)  # may raise: on all processes alike, whose tokens are the same
            for row in sorted(going):
                if (token := tokens[row]) is None or token in ends:
                    going.remove(row)
                    continue
                new[row].append(token)
                before, *tail = [asked[row].lead[-1], *new[row]][-look - 1 :]
                said = behind(tokenizer, [before], tail) if stops else ""
                if any(stop in said for stop in stops):
                    going.remove(row)
            if not going:
                break
        texts = [behind(tokenizer, each.lead, row) for each, row in zip(asked, new, strict=True)]
        return [postprocess_generated_text(text, stops, None) for text in texts]
