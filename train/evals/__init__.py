"""What a model can do: benchmarks of lm-evaluation-harness in process, and what scores them."""

from mixtral_jax.train.evals.benchmarks import TaskOptions, Tasks, find_tasks, run_tasks
from mixtral_jax.train.evals.by_length import Document, by_length_tables, long_documents, loss_by_length
from mixtral_jax.train.evals.passkey import passkey_accuracy, passkey_table
from mixtral_jax.train.evals.scoring import Continuation, score
from mixtral_jax.train.evals.tasks import listing
