"""The batch contract, packing, and the one global order of rows."""

from mixtral_jax.data.rows.batch import Batch, PairBatch
from mixtral_jax.data.rows.order import ORDER, GlobalOrder, Leg, hash64, shares
from mixtral_jax.data.rows.packing import PACKINGS, Pieces, pair_pieces
from mixtral_jax.data.rows.position import Mixture, Position, at_step, batches, order_from
from mixtral_jax.data.rows.row import WRITER_OPTIONS, RowFormat
