"""Files of any format as lumps of records."""

from mixtral_jax.data.records import sources
from mixtral_jax.data.records.files import check_file, fetched, file_identity, is_remote, local_copy, open_file
from mixtral_jax.data.records.lump import Census, Lump
from mixtral_jax.data.records.selection import choose, source_files
from mixtral_jax.data.records.sources import data_files, read_lumps, text_size_estimate, with_text_column
from mixtral_jax.data.records.staging import stage_in
