"""Records to token ids: tokenizers, chat templates, what is learned."""

from mixtral_jax.data.text.chat import encode_begun, encode_prompt
from mixtral_jax.data.text.examples import (
    SHORTEST_PAIR,
    Documents,
    cut_examples,
    join,
    text_documents,
    texts_of,
    token_dtype,
    tuning_documents,
)
from mixtral_jax.data.text.export import begins_with_bos, tokenizer_facts, tokenizer_files
from mixtral_jax.data.text.layouts import VERSION as LAYOUT_VERSION
from mixtral_jax.data.text.layouts import columns, layouts_of, with_beside
from mixtral_jax.data.text.messages import turns
from mixtral_jax.data.text.passkey import KEYS, passkey_ids
from mixtral_jax.data.text.side_files import ends_of, read_by_name
from mixtral_jax.data.text.template import Template, load_template, usual_template
from mixtral_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer, control_words, load_tokenizer
