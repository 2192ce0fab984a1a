"""For batch scripts. `python -m mixtral_jax.train.launchers RUN attempt` prints the number of a run's last start;

`... RUN CODE ATTEMPT` what comes of the one behind it: `again` or `final`, a code and why; <run>/launch counts it.
"""

import sys
from pathlib import Path

from mixtral_jax.train.launchers.verdict import verdict
from mixtral_jax.train.run_files import last_attempt

run = Path(sys.argv[1])
print(last_attempt(run) if sys.argv[2:] == ["attempt"] else verdict(run, int(sys.argv[2]), int(sys.argv[3])))
