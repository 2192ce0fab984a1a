"""Compiler flags: known to the installed compilers, set before jax starts, never over what the environment says."""

import os
import subprocess
import sys

import pytest

from mixtral_jax.config import ComputeConfig
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.plan.compile import has_libtpu
from mixtral_jax.train.run import xla_flags
from mixtral_jax.train.run.xla_flags import FLAGS, line, platform_ahead, set_xla_flags

NO_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
ON_CPU = "import jax; jax.jit(lambda x: x + 1)(1)"
FOR_TPU = """
import jax
from jax.experimental import topologies
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
x = jax.ShapeDtypeStruct((8, 8), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda x: x + 1).lower(x).compile()
"""


@pytest.fixture(autouse=True)
def not_started(monkeypatch):
    monkeypatch.setattr(xla_flags, "started", lambda: False)


def accepts(program, **env):
    """Whether a process with this environment gets through."""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **NO_TPU, **env}, capture_output=True)
    return done.returncode == 0


def test_the_installed_xla_knows_every_flag_for_gpus():
    """The parser of jaxlib is one for all platforms; that of an unknown flag ends the process."""
    flags = " ".join(FLAGS["cuda"].auto)
    assert accepts(ON_CPU, XLA_FLAGS=flags)
    assert not accepts(ON_CPU, XLA_FLAGS=f"{flags} --xla_gpu_no_such_flag=true")


@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu (extra: aot)")
def test_the_installed_libtpu_knows_every_flag_for_tpus():
    flags = " ".join(FLAGS["tpu"].auto)
    assert accepts(FOR_TPU, LIBTPU_INIT_ARGS=flags)
    assert not accepts(FOR_TPU, LIBTPU_INIT_ARGS=f"{flags} --xla_tpu_no_such_flag=true")


@pytest.mark.parametrize("platform", FLAGS)
def test_auto_sets_what_the_environment_leaves_open(platform):
    variable, auto = FLAGS[platform]
    own = f"{auto[0].partition('=')[0]}=false --xla_other=1"
    env = {"JAX_PLATFORMS": platform, variable: own}
    set_xla_flags("auto", env)
    assert env[variable] == f"{own} {' '.join(auto[1:])}"
    assert line("auto", env) == f"{variable}={env[variable]}"
    again = dict(env)
    set_xla_flags("auto", again)
    assert again == env


@pytest.mark.parametrize(("choice", "platform"), [("auto", "cpu"), ((), "cuda"), ((), "tpu"), ((), "cpu")])
def test_nothing_is_set_on_a_cpu_or_where_none_are_wanted(choice, platform):
    env = {"JAX_PLATFORMS": platform}
    set_xla_flags(choice, env)
    assert env == {"JAX_PLATFORMS": platform} and line(choice, env) == "none"


def test_a_list_is_taken_as_it_is_and_one_that_xla_refuses_is_named():
    env = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    set_xla_flags(("--xla_gpu_enable_latency_hiding_scheduler=false",), env)
    assert env["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=false"
    with pytest.raises(UserError, match=r"compute\.xla_flags: XLA refuses --xla_gpu_nonsense=1: Unknown flag"):
        set_xla_flags(("--xla_gpu_nonsense=1",), env)
    assert "nonsense" not in env["XLA_FLAGS"]
    for bad in (["xla_gpu_x=1"], ["--a b"], "off"):
        with pytest.raises(ValueError, match="xla_flags"):
            ComputeConfig(xla_flags=bad)


def test_where_jax_has_started_it_is_too_late_and_said(monkeypatch):
    monkeypatch.setattr(xla_flags, "started", lambda: True)
    env = {"JAX_PLATFORMS": "cuda"}
    set_xla_flags("auto", env)
    assert env == {"JAX_PLATFORMS": "cuda"}
    assert line("auto", env).startswith("none; too late for --xla_gpu_enable_latency_hiding_scheduler=true")


def test_the_platform_is_told_without_starting_jax(monkeypatch):
    assert [platform_ahead({"JAX_PLATFORMS": p}) for p in ("gpu", "tpu,cpu", "cpu")] == ["cuda", "tpu", "cpu"]
    found = {"/dev/accel*": ["/dev/accel0"]}
    monkeypatch.setattr(xla_flags.glob, "glob", lambda pattern: found.get(pattern, []))
    assert platform_ahead({}) == "tpu"
    found["/dev/nvidia[0-9]*"] = ["/dev/nvidia0"]
    assert platform_ahead({}) == "cuda"
    found.clear()
    assert platform_ahead({}) == "cpu"


def test_the_command_line_sets_them_before_jax_starts(tmp_path):
    """A run with a flag that changes nothing shows it on its first screen, in env.json, and to jax."""
    program = (
        "import sys, launch; from mixtral_jax.train.run import xla_flags as f;"
        "f.FLAGS['cpu'] = f.Flags('XLA_FLAGS', ('--xla_force_host_platform_device_count=2',));"
        "code = launch.main(sys.argv[1:]); import jax; print('devices', jax.device_count()); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "pretrain", "configs/pretrain/quickstart.yaml", "--dry-run",
               f"output_dir={tmp_path}"]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | NO_TPU
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "devices 2" in done.stdout, done.stdout + done.stderr
    assert "flags  XLA_FLAGS=--xla_force_host_platform_device_count=2" in done.stdout
