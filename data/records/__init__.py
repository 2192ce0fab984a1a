"""Files of any format as lumps of records."""

from mixtral_jax.data.records import sources
from mixtral_jax.data.records.files import (
    ask_anew,
    check_file,
    exists,
    fetched,
    file_identity,
    file_size,
    file_system,
    files_below,
    is_directory,
    is_remote,
    join,
    local_directory,
    open_file,
    own_name,
    put,
    read_small,
    remove_below,
    sizes_below,
)
from mixtral_jax.data.records.lump import Census, Lump, Place, Unit
from mixtral_jax.data.records.selection import Chosen, choose, source_files
from mixtral_jax.data.records.sources import (
    compression,
    data_files,
    file_format,
    read_lumps,
    text_size_estimate,
    with_text_column,
)
from mixtral_jax.data.records.staging import (
    COPIED,
    META,
    clear_scratch,
    digest,
    kept,
    locked,
    replace_or_overwrite,
    scratch,
    stage_in,
    staging_room,
    stripe,
    write_atomically,
)
from mixtral_jax.data.records.units import units_of
