"""The safetensors format against the safetensors library."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mixtral_jax.convert.files import Directory
from mixtral_jax.convert.safetensors import layout, read_tensors
from tests.convert_files import BF16

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(5).astype(BF16),
    "scalar": np.array(2.5, np.float16),
}


def test_header_is_read_as_the_library_wrote_it(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_tensors(Directory(tmp_path), ["x.safetensors"])
    assert header.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        tensor = header[name]
        assert (tensor.shape, tensor.nbytes) == (want.shape, want.nbytes)
        got = tensor.rows(0, len(want)) if want.shape else tensor.rows(0, 1)[0]
        assert got.dtype == want.dtype and np.array_equal(got, want)


def test_layout_is_read_by_the_library(tmp_path):
    head, offsets = layout([(n, t.dtype, t.shape) for n, t in TENSORS.items()])
    data = bytearray(head)
    for name, tensor in TENSORS.items():
        assert offsets[name] == len(data)
        data += tensor.tobytes()
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in TENSORS.items():
            assert np.array_equal(file.get_tensor(name), tensor)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "is truncated: 0 bytes"),
        ((1 << 60).to_bytes(8, "little") + b"x" * 90, "its header would have"),
        ((10).to_bytes(8, "little") + b"not json!!", "its header does not parse"),
        (
            (2).to_bytes(8, "little") + b"{}" + b"tail",
            "longer than its header says: 14 bytes on disk, 10 by its header",
        ),
        ((4).to_bytes(8, "little") + b"[10]", "its header does not parse"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, match):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_tensors(Directory(tmp_path), ["x.safetensors"])


def test_a_shape_that_does_not_fit_its_bytes(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x" * 8)
    with pytest.raises(ValueError, match=r"a has shape \[3\] of F32 but 8 bytes"):
        read_tensors(Directory(tmp_path), ["x.safetensors"])
