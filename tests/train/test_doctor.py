"""Known-bad pairs, devices and disk."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_jax.kernels import choice
from mixtral_jax.parallel import Machine
from mixtral_jax.train.commands import doctor
from mixtral_jax.train.run import environment

GOOD = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "orbax-checkpoint": "0.12.8", "libtpu": "0.0.42.1"}


def test_this_machine_can_start_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.examine(tmp_path) == 0
    out = capsys.readouterr().out
    assert "devices 8 x cpu" in out
    assert out.splitlines()[-1] == "doctor: a run can start"
    assert all(doctor.installed()[name] for name in environment.PACKAGES if name not in doctor.OPTIONAL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.12.9", "libtpu": None}, "flax 0.12.9 fails to import on jax"),
        (
            {"jax": "0.11.1", "jaxlib": "0.11.1", "libtpu": None, "jax-cuda13-plugin": "0.11.1"},
            "jax 0.11.1 gives wrong values",
        ),
        ({"jaxlib": "0.9.1"}, "jax 0.10.2 with jaxlib 0.9.1: install one release of both"),
        ({"jax": "0.9.0", "jaxlib": "0.9.0", "libtpu": None}, "older than 0.10.2"),
        ({"orbax-checkpoint": "0.11.5"}, "orbax-checkpoint 0.11.5 has another v1 interface"),
        ({"libtpu": "0.0.41"}, "libtpu 0.0.41 is not the one that jax 0.10.2 names"),
    ],
)
def test_known_bad_pairs(change: dict[str, str | None], message: str) -> None:
    (found,) = doctor.known_bad({**GOOD, **change}, "0.0.42")
    assert message in found


def test_good_and_absent_versions_are_no_problem() -> None:
    assert doctor.known_bad(GOOD, "0.0.42") == []
    assert doctor.known_bad({**GOOD, "jax": "0.12.0.1", "jaxlib": "0.12.0.1", "flax": "0.12.12"}) == []
    assert doctor.known_bad({**GOOD, "libtpu": None}, "0.0.42") == []
    assert doctor.known_bad(dict.fromkeys(GOOD)) == []


def test_jax_names_its_libtpu() -> None:
    assert doctor.parsed(doctor.libtpu_of_jax())[:2] == (0, 0)


@pytest.mark.parametrize(
    ("version", "numbers"), [("0.12.8", (0, 12, 8)), ("2.13.0+cpu", (2, 13, 0)), ("0.5rc1", (0,)), (None, ())]
)
def test_versions_are_compared_as_numbers(version: str | None, numbers: tuple[int, ...]) -> None:
    assert doctor.parsed(version) == numbers


def test_problems_are_named_and_exit_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "installed", lambda: {**GOOD, "grain": None, "tokamax": None, "jaxlib": "0.9.1"})
    monkeypatch.setattr(doctor, "libtpu_of_jax", lambda: "0.0.42")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor.examine(tmp_path) == 2
    out = capsys.readouterr().out
    for part in ("jaxlib 0.9.1", "only 1.0 GiB free", "is not writable", "grain is not installed"):
        assert part in out
    assert "tokamax is not installed" not in out.split("problem", 1)[1]
    assert out.splitlines()[-1] == "doctor: 4 problems, named above"


def test_a_gpu_without_tokamax_is_a_problem_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_tokamax", lambda: False)
    lines, problems = doctor.kernels(Machine("gpu", "NVIDIA A100-SXM4-80GB"))
    assert "pip install 'mixtral-jax[cuda]'" in problems[0] and "grouped matmul" not in lines
    assert lines["attention"].startswith("triton (cudnn needs an NVIDIA GPU of the Hopper generation")
    assert lines["attention in float32"].startswith("chunked (")
    lines, problems = doctor.kernels(Machine("cpu", "cpu"))
    assert not problems and lines["grouped matmul"] == "blocked (the fastest on cpu)"


def test_a_broken_backend_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax.numpy as jnp

    def broken(shape: tuple[int, ...]) -> None:
        raise RuntimeError("no driver\nmore")

    monkeypatch.setattr(jnp, "ones", broken)
    assert doctor.devices() == ([], ["jax cannot compute: RuntimeError: no driver"])
