"""Tokens as the pieces of text that they are."""

from collections.abc import Sequence

from mixtral_jax.data.text import Tokenizer

_PART = "\ufffd"  # what bytes that are no whole character are decoded to


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The text of each token, and the places of control tokens, which are shown by their names.

    The others join to the text; of a character of several tokens only the last has text.
    """
    named = controls(tokenizer)
    found: list[str] = []
    text: list[int] = []
    shown = ""
    for id_ in ids:
        if id_ in named:
            found.append(named[id_])
            text, shown = [], ""
            continue
        text.append(id_)
        now = tokenizer.decode(text)
        whole = not now.endswith(_PART)
        found.append(now[len(shown) :] if whole else "")
        shown = now if whole else shown
    return tuple(found), tuple(i for i, id_ in enumerate(ids) if id_ in named)


def controls(tokenizer: Tokenizer) -> dict[int, str]:
    """Names of the control tokens by their ids."""
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    own = {id_: name for name in tokenizer.controls if (id_ := tokenizer.id_of(name)) is not None}
    return own | {id_: tokenizer.piece_of(id_) for id_ in ends}


def piece(tokenizer: Tokenizer, id_: int) -> str:
    """One token behind other text, so that a space in front shows; by its name where it is no text by itself."""
    before = tokenizer.encode("a")
    lead = len(tokenizer.decode(before))
    text = tokenizer.decode([*before, id_])[lead:]
    return tokenizer.piece_of(id_) if not text or _PART in text or id_ in controls(tokenizer) else text
