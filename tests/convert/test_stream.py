"""The stream: every slot once, bounded memory, errors that end it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import stream
from mixtral_jax.convert.hf import HfSource
from mixtral_jax.convert.stream import Source, bands, copy
from mixtral_jax.convert.table import blocked_transpose, slots
from tests.convert_files import BF16, TINY, hub_shapes

CONFIG = MixtralConfig.from_hf(TINY)


class Counting(Source):
    """A source of row numbers, and a sink that counts what it is given."""

    def __init__(self, band=None):
        self.config, self.slots, self._band = CONFIG, slots(CONFIG), band
        self.seen = {s.name: np.zeros(s.rows, int) for s in self.slots}
        self.order = []

    def dtype(self, slot):
        return np.dtype(np.float32)

    def band(self, slot):
        return self._band

    def cost(self, slot):
        return 0

    def read(self, slot, start, stop):
        return np.broadcast_to(np.arange(start, stop, dtype=np.float32), (slot.cols, stop - start)).T

    def put(self, slot, start, stop, rows):
        assert np.array_equal(rows(start, stop)[:, 0], np.arange(start, stop))
        self.seen[slot.name][start:stop] += 1
        self.order.append((slot.name, start))


@pytest.mark.parametrize("band", [None, 10, 7])
@pytest.mark.parametrize("in_order", [False, True])
def test_every_row_of_every_slot_once(band, in_order):
    both = Counting(band)
    tally = copy(both, both, both.dtype, in_order=in_order)
    assert all((count == 1).all() for count in both.seen.values())
    assert tally.bytes == 4 * CONFIG.num_params()
    if in_order:
        names = list(dict.fromkeys(name for name, _ in both.order))
        assert names == [s.name for s in both.slots]


def test_a_slot_left_out_or_written_twice_is_an_error_with_both_lists():
    both = Counting()
    sink = Counting()
    sink.slots = [*both.slots[1:], both.slots[5]]
    with pytest.raises(ValueError, match=f"not written: {both.slots[0].name}; written twice: {both.slots[5].name}"):
        copy(both, sink, both.dtype)


def test_an_error_in_one_piece_ends_the_stream():
    both = Counting()

    def put(slot, start, stop, rows):
        raise OSError("disk on fire")

    both.put = put
    with pytest.raises(OSError, match="disk on fire"):
        copy(both, both, both.dtype)


def test_pieces_hold_whole_heads_and_stay_small():
    config = MixtralConfig.preset("mixtral-8x22b")
    for slot in slots(config):
        rows = bands(slot, 2, None)
        assert rows % slot.leaf.row_step == 0 or rows == slot.rows
        assert rows * slot.cols * 2 <= 2 * stream.PIECE
        assert rows * slot.cols * 2 >= stream.PIECE or rows == slot.rows


@pytest.mark.parametrize("shape", [(1, 1), (33, 1025), (2048, 64), (5, 7)])
def test_blocked_transpose(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    out = blocked_transpose(matrix)
    assert out.flags.c_contiguous and np.array_equal(out, matrix.T)


MEASURE = """
import json, sys
import jax
from mixtral_jax.convert import hf2orbax, orbax2hf
jax.devices()  # a plug-in for accelerators may be loaded
def peak():
    return next(int(l.split()[1]) / 1e3 for l in open("/proc/self/status") if l.startswith("VmHWM"))
peaks = [peak()]
hf2orbax(sys.argv[1], sys.argv[2], progress=False); peaks.append(peak())
orbax2hf(sys.argv[2], sys.argv[3], progress=False); peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_memory_is_bounded_far_below_the_size_of_the_checkpoint(tmp_path, root):
    """550 MB go both ways in 400 MB beyond the imports, in pieces of 29 MB; the stacked leaves are 350 and 180 MB."""
    shape = {**TINY, "hidden_size": 1024, "intermediate_size": 3584, "num_local_experts": 8, "num_hidden_layers": 3}
    write_random(tmp_path / "hf", shape)
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / n) for n in ("hf", "orbax", "back"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    imported, importing, exporting = json.loads(done.stdout)
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size / 1e6
    assert size > 500
    assert importing - imported < 250, (imported, importing, exporting)
    assert exporting - imported < 400, (imported, importing, exporting)
    before, after = HfSource(tmp_path / "hf"), HfSource(tmp_path / "back")
    for a, b in zip(before.slots, after.slots, strict=True):
        assert before.read(a, 0, a.rows).tobytes() == after.read(b, 0, b.rows).tobytes(), a.name


def write_random(directory, shape):
    """A hub directory of random bits, written without ever being held."""
    from mixtral_jax.convert.safetensors import layout

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape))
    rng = np.random.default_rng(0)
    head, _ = layout([(n, BF16, s) for n, s in hub_shapes(shape).items()])
    with open(directory / "model.safetensors", "wb") as file:
        file.write(head)
        for own in hub_shapes(shape).values():
            # exponents below all ones: finite
            file.write((rng.integers(0, 1 << 16, own, np.uint16) & 0xBFFF).tobytes())
