"""Files of any format as lumps of records."""

from mixtral_jax.data.records import sources
from mixtral_jax.data.records.lump import Census, Lump
from mixtral_jax.data.records.sources import data_files, read_lumps, source_files, text_size_estimate
