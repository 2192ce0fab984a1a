"""Pages that open from a disk without network: one file of HTML each, with our own small style sheet and script."""

from mixtral_jax.train.pages.charts import Mark, Series, heat_map, lines, stacked
from mixtral_jax.train.pages.document import (
    Section,
    choose,
    details,
    embed,
    escape,
    figure,
    grid,
    number,
    page,
    table,
    tiles,
)
