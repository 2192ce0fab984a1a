"""Steps of an entry of the race with its own data, one for each line of input: speedrun.py times two such in turn.

python -m tests.bench.speedrun_step FOLDER CONFIG [a.b=c ...]
"""

import sys

from mixtral_jax.train.config import load_config
from mixtral_jax.train.trainer import Trainer
from tests.bench.worker import serve

if __name__ == "__main__":
    folder, config, *changes = sys.argv[1:]
    endless = ["steps=1000000", "eval.every=null", "checkpoint.every=1000000", "log.tensorboard=false"]
    with Trainer(load_config(config, [*changes, *endless, f"output_dir={folder}"]).config, quiet=True) as trainer:
        steps = trainer.steps()
        serve(lambda _: next(steps).metrics["train/loss"])
