"""The batch contract, packing, and the one global order of rows."""

from mixtral_jax.data.rows.batch import Batch, PairBatch
from mixtral_jax.data.rows.order import GlobalOrder, hash64, shares
from mixtral_jax.data.rows.packing import PACKINGS, Pieces, pair_pieces
from mixtral_jax.data.rows.row import WRITER_OPTIONS, RowFormat
