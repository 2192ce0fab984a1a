"""A digest of weights: the same in every format and precision, another where a value is another."""

import pytest

from mixtral_jax.convert import check_identity, hf2orbax, identity, open_source, weights_identity
from tests.convert_files import BF16, TINY, fuse, random_tensors, write_hub

NAME = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize("whole", [1 << 29, 0], ids=["small", "large"])
def test_the_digest_is_of_the_values(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", whole)
    tensors = random_tensors(TINY, BF16)
    write_hub(tmp_path / "hf", TINY, tensors, shards=2)
    write_hub(tmp_path / "fused", TINY, fuse(tensors, TINY))
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", dtype="float32", progress=False)
    found = {weights_identity(open_source(tmp_path / name)) for name in ("hf", "fused", "orbax")}
    assert len(found) == 1
    moved = {name: tensor * BF16.type(1.01) for name, tensor in tensors.items()} if not whole else {**tensors}
    moved[NAME] = moved[NAME].copy()
    moved[NAME][3, 4] += BF16.type(1)
    source = open_source(write_hub(tmp_path / "moved", TINY, moved))
    noted = {"path": "runs/base", "step": 4, "digest": found.pop()}
    with pytest.raises(ValueError, match=f"here holds .* of runs/base at step 4 with digest {noted['digest']}"):
        check_identity(noted, source, "here")
    check_identity(noted | {"digest": None}, source, "here")
    check_identity(None, source, "here")
