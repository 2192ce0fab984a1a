"""What the routers of a Mixtral do with text: the numbers of the paper's section 5 (2401.04088), and more."""

from mixtral_jax.train.evals.routing.observe import Options
from mixtral_jax.train.evals.routing.page import render
from mixtral_jax.train.evals.routing.result import Result
from mixtral_jax.train.evals.routing.survey import measure
