"""An installed wheel and an editable install both work, and our general top-level names shadow nothing."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("mixtral_jax", "data", "train", "launch")
SHIPPED = ("mixtral_jax", "data", "train", "configs", "launch.py", "pyproject.toml", "README.md", "LICENSE")
WHERE = "import mixtral_jax, data, train, launch; print(*(m.__file__ for m in (mixtral_jax, data, train, launch)))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build/ appears in the checkout; without network."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
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
    assert (
        {"mixtral_jax", "data", "train", "launch.py"}
        <= tops
        <= {"mixtral_jax", "data", "train", "configs", "launch.py"}
    )
    for room in ROOMS[:3]:
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / room).rglob("*.py")}
        assert sources <= set(names)
    for folder, kinds in (("configs", (".yaml",)), ("data/samples", (".gz", ".model", ".md", ".txt", ".jsonl"))):
        shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.suffix in kinds}
        assert shipped <= set(names)


def test_the_installed_wheel_is_what_is_imported(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    found = python("-c", WHERE, cwd=tmp_path, path=site).split()
    assert all(Path(file).is_relative_to(site) for file in found), found
    assert "mixtral-jax" in python("-m", "launch", "--help", cwd=tmp_path, path=site)
    assert "jax" in python(
        "-c", "import mixtral_jax as mj; print(mj.MixtralConfig.preset('tiny'), 'jax')", cwd=tmp_path, path=site
    )


def test_the_editable_install_is_the_checkout(tmp_path: Path) -> None:
    found = python("-c", WHERE, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(ROOT) for file in found), found


def test_a_users_own_data_and_train_are_not_in_the_way(tmp_path: Path) -> None:
    """People keep `data/` and `train.py` where they work; the command line must not import those."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError('the wrong data')")
    (tmp_path / "train.py").write_text("raise RuntimeError('the wrong train')")
    assert "steps" in python(str(ROOT / "launch.py"), "config", "schema", "pretrain", cwd=tmp_path)
    script = Path(sysconfig.get_path("scripts")) / "mixtral-jax"
    assert script.exists(), "the console script is not installed"
    assert "steps" in python(str(script), "config", "schema", "pretrain", cwd=tmp_path)


@pytest.mark.parametrize("room", ROOMS)
def test_no_other_package_has_a_room_of_that_name(room: str) -> None:
    assert room not in sys.stdlib_module_names
    owners = {owner.lower() for owner in metadata.packages_distributions().get(room, [])}
    assert owners <= {"mixtral-jax", "mixtral_jax"}
