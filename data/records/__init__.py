"""Files of any format as lumps of records."""

from mixtral_jax.data.records import sources
from mixtral_jax.data.records.files import (
    check_file,
    exists,
    fetched,
    file_identity,
    file_system,
    files_below,
    is_directory,
    is_remote,
    local_copy,
    local_directory,
    open_file,
    own_name,
)
from mixtral_jax.data.records.lump import Census, Lump, Unit
from mixtral_jax.data.records.selection import Choice, choose, source_files
from mixtral_jax.data.records.sources import (
    compression,
    data_files,
    file_format,
    read_lumps,
    text_size_estimate,
    with_text_column,
)
from mixtral_jax.data.records.staging import clear_scratch, scratch, stage_in, staging_room
from mixtral_jax.data.records.units import units_of
