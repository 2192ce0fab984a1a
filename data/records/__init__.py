"""Files of any format as lumps of records."""

from mixtral_jax.data.records import sources
from mixtral_jax.data.records.files import check_file, file_identity, is_remote, open_file
from mixtral_jax.data.records.lump import Census, Lump, Unit
from mixtral_jax.data.records.selection import choose, source_files
from mixtral_jax.data.records.sources import (
    compression,
    data_files,
    file_format,
    read_lumps,
    text_size_estimate,
    with_text_column,
)
from mixtral_jax.data.records.units import units_of
