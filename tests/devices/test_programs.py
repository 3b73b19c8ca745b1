"""Programs by key: each is built once, in the background or where it is needed first, and nobody waits for others; and
the folder in which they are kept for the next process.
"""

import os
import pathlib
import threading

import jax
import pytest

from rl.config.load import load_config
from rl.devices.libtpu import asks_libtpu, quiet_libtpu
from rl.devices.programs import Programs, use_compilation_cache
from rl.run.profiling import Profile

SECONDS = 30  # that a test waits for what must happen at once


class Gate:
    """A build that says when it has begun, and ends when it is let through."""

    def __init__(self):
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.open.wait(SECONDS)
        return "through the gate"


def thread_name():
    return threading.current_thread().name


def test_a_program_is_built_once_by_whoever_asks_first():
    programs, built = Programs(), []

    def build():
        built.append(thread_name())
        return len(built)

    assert [programs.get("a", build) for _ in range(3)] == [1, 1, 1]
    programs.prepare("a", build)
    programs.prepare("b", build)
    programs.prepare("b", build)
    programs.wait()
    assert programs.get("b", build) == 2
    assert built[0] == thread_name() != built[1]
    assert (len(programs), set(programs)) == (2, {"a", "b"})


def test_what_is_asked_for_is_not_waiting_behind_others_in_the_background():
    programs, gate = Programs(), Gate()
    programs.prepare("slow", gate)
    programs.prepare("wanted", thread_name)
    assert gate.begun.wait(SECONDS)
    assert programs.get("wanted", thread_name) == thread_name(), "built here, while the background is at another"
    assert not gate.open.is_set()
    gate.open.set()
    assert programs.get("slow", thread_name) == "through the gate"
    programs.wait()


def test_one_that_is_being_built_is_waited_for_and_not_built_again():
    programs, gate, got = Programs(), Gate(), []
    programs.prepare("slow", gate)
    assert gate.begun.wait(SECONDS)
    waiting = threading.Thread(target=lambda: got.append(programs.get("slow", thread_name)))
    waiting.start()
    gate.open.set()
    waiting.join(SECONDS)
    assert got == ["through the gate"]


def test_a_failure_shows_where_the_program_is_asked_for():
    programs = Programs()

    def fail():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        programs.get("a", fail)
    assert programs.get("a", thread_name) == thread_name(), "asked again it is built again"
    programs.prepare("b", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        programs.wait()
    with pytest.raises(RuntimeError, match="no memory"):
        programs.get("b", thread_name)


def test_close_drops_what_waits_and_lets_what_is_being_built_come_to_its_end():
    programs, gate, built = Programs(), Gate(), []
    programs.prepare("slow", gate)
    programs.prepare("never", lambda: built.append("never"))
    assert gate.begun.wait(SECONDS)
    threading.Timer(0.05, gate.open.set).start()
    programs.close()
    assert programs.get("slow", thread_name) == "through the gate"
    assert not built
    programs.wait()


@pytest.fixture
def cache_settings():
    """What jax is told of its cache, as a function; as it was before, afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda: tuple(getattr(jax.config, name) for name in names)
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_unless_something_else_is_said(
    cache_settings, tmp_path, monkeypatch, capsys
):
    before = cache_settings()
    auto = load_config(None, [])
    use_compilation_cache(auto)  # JAX_COMPILATION_CACHE_DIR is set
    assert cache_settings() == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # where no folder can be made
    use_compilation_cache(auto)
    said = f"warning: compiled programs are not kept for the next start: {tmp_path / 'file'} is no folder\n"
    assert capsys.readouterr().err == said
    with pytest.raises(
        ValueError, match=r"logging\.compilation_cache must be a folder .*/file is no folder; choose ano"
    ):
        use_compilation_cache(load_config(None, [f"logging.compilation_cache={tmp_path / 'file' / 'x'}"]))
    if os.path.isdir("/proc/self"):  # where permissions do not tell
        with pytest.raises(ValueError, match="/proc cannot be written"):
            use_compilation_cache(load_config(None, ["logging.compilation_cache=/proc/nope"]))
    use_compilation_cache(load_config(None, ["logging.compilation_cache=null"]))
    assert cache_settings() == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_compilation_cache(auto)
    assert cache_settings() == (str(tmp_path / "cache" / "tandem" / "programs"), 0)
    assert not pathlib.Path(cache_settings()[0]).exists()  # the first compilation makes it
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compilation_cache(load_config(None, ["logging.compilation_cache=~/programs"]))
    assert cache_settings() == (str(tmp_path / "programs"), 0)
    monkeypatch.delenv("XDG_CACHE_HOME")
    use_compilation_cache(auto)
    assert cache_settings() == (str(tmp_path / ".cache" / "tandem" / "programs"), 0)


def test_libtpu_is_told_what_it_would_complain_of_only_where_there_is_no_tpu(tmp_path, monkeypatch):
    names = ("TPU_WORKER_HOSTNAMES", "TPU_HOST_BOUNDS")
    for device in ("accel0", "vfio/0"):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
        quiet_libtpu(tmp_path)
        assert not {*names} & {*os.environ}
        (tmp_path / device).unlink()
    monkeypatch.setenv("TPU_HOST_BOUNDS", "2,2,1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "")  # so that it is as before afterwards
    del os.environ["TPU_WORKER_HOSTNAMES"]
    quiet_libtpu(tmp_path)
    assert [os.environ[name] for name in names] == ["localhost", "2,2,1"]


def test_libtpu_is_not_loaded_where_jax_has_the_cpu_alone_and_a_profile_beside_it_is_refused(tmp_path, monkeypatch):
    section = load_config(None, ["profile.steps=[1, 2]"]).profile
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "libtpu" else None)
    jax.config.update("jax_platforms", None)
    try:
        (tmp_path / "nvidia0").touch()  # jax may use it, or say what is missing
        quiet_libtpu(tmp_path)
        assert asks_libtpu()
        with pytest.raises(
            ValueError, match=r"profile\.steps must be \[\] while .* JAX_PLATFORMS=cpu, or uninstall libtpu"
        ):
            Profile(section, 3, print)
        (tmp_path / "nvidia0").unlink()
        quiet_libtpu(tmp_path)
        assert jax.config.jax_platforms == "cpu"
        Profile(section, 3, print)
    finally:
        jax.config.update("jax_platforms", "cpu")
