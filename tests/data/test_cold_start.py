"""Many processes that start cold on one cache at once: with one process number and one host name, as the containers of
a job have them; and on hosts that do not see each other's locks.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prepared import MODEL, ROOT

_PROGRAM = """
import fcntl, glob, hashlib, json, os, socket, sys, time
from pathlib import Path
from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare import hashes, prepared
from mixtral_jax.data.records import staging

place, own, count, starts, how = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
os.getpid, socket.gethostname = lambda: 7, lambda: "pod"
if "no locks" in how:
    fcntl.flock = lambda *_: None
    staging._kernel = lambda: own
if "no randomness" in how:
    os.urandom, staging._kernel = lambda n: b"7" * n, lambda: "pod"
hashed, sha256 = [], hashlib.sha256
class Counted:
    def __init__(self, *content): self.it = sha256(*content)
    def update(self, piece):
        hashed.append(len(piece))
        self.it.update(piece)
    def hexdigest(self): return self.it.hexdigest()
hashes.hashlib = type(sys)("hashlib")
hashes.hashlib.sha256 = Counted
rows, failed = set(), []
for start in range(starts):
    (place / f"ready-{start}-{own}").touch()
    while len(glob.glob(f"{place}/ready-{start}-*")) < count:
        time.sleep(0.001)
    config = DataConfig(tokenizer=sys.argv[6], cache_dir=str(place / f"cache-{start}"), workers=1,
                        train=[{"name": "s", "path": str(place / "texts" / "*.jsonl")}])
    try:
        rows.add(prepared.prepare(config, 32, 0, progress=False).train[0].rows)
    except Exception as error:
        failed.append(f"{type(error).__name__}: {error}"[:200])
print(json.dumps([sorted(rows), failed, sum(hashed)]))
"""
COUNT = 4


def start(place: Path, starts: int, how: str) -> tuple[set[int], list[str], int, int]:
    """Row counts, failures, and bytes hashed by all processes; and how many bytes the texts have."""
    (place / "texts").mkdir()
    total = 0
    for i in range(8):
        text = "".join(json.dumps({"text": f"text {i} {j} " * (j % 5 + 1)}) + "\n" for j in range(20))
        (place / "texts" / f"{i}.jsonl").write_text(text)
        total += len(text)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(place), str(i), str(COUNT), str(starts), how, str(MODEL)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for i in range(COUNT)
    ]  # fmt: skip
    found = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    rows = {count for of_process, _, _ in found for count in of_process}
    return rows, [each for _, failed, _ in found for each in failed], sum(size for *_, size in found), total


def test_processes_with_one_number_start_at_once_and_hash_each_file_once(tmp_path: Path) -> None:
    rows, failed, hashed, total = start(tmp_path, 8, "")
    assert failed == []
    assert len(rows) == 1
    assert hashed == 8 * total  # once a start, and not once a process
    for cache in tmp_path.glob("cache-*"):
        assert not [path.name for path in cache.iterdir() if "tmp" in path.name or "parts" in path.name]


def test_hosts_that_do_not_see_each_others_locks_start_at_once(tmp_path: Path) -> None:
    rows, failed, *_ = start(tmp_path, 8, "no locks")
    assert failed == []
    assert len(rows) == 1


@pytest.mark.slow
def test_without_randomness_in_the_names_they_get_in_each_others_way(tmp_path: Path) -> None:
    """The tests above see what they are for."""
    assert start(tmp_path, 8, "no locks, no randomness")[1]
