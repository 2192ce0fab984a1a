"""Tokenise and pack once: sources into rows on disk, in a cache that no later run can mistake."""

from mixtral_jax.data.prepare.cache import (
    PreparedSource,
    Use,
    address_of,
    digest,
    keep,
    open_cache,
    recall,
    write_atomically,
)
from mixtral_jax.data.prepare.glance import check_first_records, first_documents
from mixtral_jax.data.prepare.inventory import Entry, drop, entries
from mixtral_jax.data.prepare.prepared import PreparedData, prepare
from mixtral_jax.data.prepare.workers import search_path
from mixtral_jax.data.records import replace_or_overwrite
