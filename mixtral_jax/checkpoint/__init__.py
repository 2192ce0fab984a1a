"""Arrays on disk: whole trees onto any mesh, and slices of leaves. Orbax and tensorstore are imported here alone."""

from mixtral_jax.checkpoint.pieces import HELD, PIECE, piece_shape
from mixtral_jax.checkpoint.slices import ArrayReader, ArraySpec, ArrayWriter
from mixtral_jax.checkpoint.trees import (
    COMMIT,
    FORMAT,
    STATE,
    check_fits,
    damage,
    discard_unfinished,
    is_there,
    read_item,
    restore,
    save,
    save_async,
    tree_shapes,
)
