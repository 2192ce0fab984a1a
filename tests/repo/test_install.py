"""An installed wheel and an editable install both work, and nothing general is installed under a top-level name."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.sources import ROOT, SOURCES, relative

SHIPPED = ("mixtral_jax", "data", "train", "configs", "launch.py", "pyproject.toml", "README.md", "LICENSE")
WHERE = (
    "import mixtral_jax, mixtral_jax.data, mixtral_jax.train, mixtral_jax.launch as launch\n"
    "print(*(m.__file__ for m in (mixtral_jax, mixtral_jax.data, mixtral_jax.train, launch)))"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build/ appears in the checkout; without network."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(directory), str(source)], check=True)
    return next(directory.glob("*.whl"))


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_rooms_the_configs_and_the_samples_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"mixtral_jax"}
    inside = {
        relative(path) if relative(path).startswith("mixtral_jax/") else f"mixtral_jax/{relative(path)}"
        for path in SOURCES
    }
    assert inside <= set(names)
    samples = (".gz", ".model", ".md", ".txt", ".jsonl")
    for folder, kinds in (("configs", (".yaml",)), ("data/samples", samples), ("train", (".css", ".js", ".yaml"))):
        shipped = {f"mixtral_jax/{relative(p)}" for p in (ROOT / folder).rglob("*") if p.suffix in kinds}
        assert shipped <= set(names)


def test_the_installed_wheel_is_what_is_imported(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    found = python("-c", WHERE, cwd=tmp_path, path=site).split()
    assert all(Path(file).is_relative_to(site) for file in found), found
    assert "mixtral-jax" in python("-m", "mixtral_jax.launch", "--help", cwd=tmp_path, path=site)
    assert "jax" in python(
        "-c", "import mixtral_jax as mj; print(mj.MixtralConfig.preset('tiny'), 'jax')", cwd=tmp_path, path=site
    )


def test_the_editable_install_is_the_checkout(tmp_path: Path) -> None:
    found = python("-c", WHERE, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(ROOT) for file in found), found


def test_a_users_own_files_are_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """People keep `data.py` and `json.py` where they work; the command line must not import those."""
    for name in ("data", "train", "json", "random", "argparse", "numpy", "jax", "launch", "mixtral_jax"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the wrong {name}')")
    for safe in ("", "1"):  # which takes the script's own directory away too
        monkeypatch.setenv("PYTHONSAFEPATH", safe)
        assert "steps" in python(str(ROOT / "launch.py"), "config", "schema", "pretrain", cwd=tmp_path)
    script = Path(sysconfig.get_path("scripts")) / "mixtral-jax"
    assert script.exists(), "the console script is not installed"
    assert "steps" in python(str(script), "config", "schema", "pretrain", cwd=tmp_path)


@pytest.mark.parametrize("room", ["train", "data"])
def test_a_room_has_one_name(room: str, tmp_path: Path) -> None:
    """Imported as `train` its classes would exist twice."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {room}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"ImportError: this folder is imported as mixtral_jax.{room}" in done.stderr
