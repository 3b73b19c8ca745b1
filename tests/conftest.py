"""Session setup: eight virtual CPU devices, before anything imports jax; and what `--fast` leaves out."""

import ast
import itertools
import os
import pathlib

import pytest

# Assigned, not defaulted: a platform or flag from the caller's shell must not change what the tests test.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is LLVM optimising programs that then run for milliseconds; unoptimised, the same HLO is
# compiled in half of it.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# No test may reach for a hub: a missing file should fail at once, not after a network time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
# Processes that tests start find nothing compiled, unless their recipe names a cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Processes that tests start read the bytecode that the first of them wrote: compiling the sources takes half a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Two test processes may describe TPU chips at a time; none of them opens a real one.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

# What builds a model, holds its state or trains it; compiling that is most of the suite's time.
BUILDERS = {
    "rl.api",
    "rl.state.checkpoint",
    "rl.grpo_trainer",
    "rl.models.files.hf",
    "rl.models.linen_model",
    "rl.models.nnx_model",
    "rl.models.flavours",
    "rl.models.foreign.own_config",
    "rl.models.policy",
    "rl.state.optimizer",
    "rl.sampler.slot_sampler",
    "rl.sft_trainer",
    "rl.training.train_step",
    "rl.training.update",
    "rl.tools.trained",
}

# What compiles the same programs again and again: for each run, in each flavour, for each sampler of a model.
COMPILED_OFTEN = {
    "rl.api",
    "rl.cli",
    "rl.grpo_trainer",
    "rl.sampler.slot_sampler",
    "rl.sft_trainer",
    "rl.training.train_step",
}


def pytest_addoption(parser):
    parser.addoption(
        "--fast", action="store_true", help="only files that build no model, without what is marked slow or long"
    )


def pytest_configure(config):
    if config.getoption("--fast"):
        config.option.markexpr = "not slow and not long"


def pytest_ignore_collect(collection_path, config):
    """With `--fast`, whether a test file or a helper that it imports imports one of the builders."""
    if config.getoption("--fast") and collection_path.name.startswith("test_"):
        return True if _imports_a_builder(collection_path) else None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of each test marked `matrix`, the combinations beyond those that hold every value of each parameter are long."""
    matrices = {}
    for item in items:
        if item.get_closest_marker("matrix"):
            matrices.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for combinations in matrices.values():
        values = {item: {(name, id(value)) for name, value in item.callspec.params.items()} for item in combinations}
        used = dict.fromkeys(set().union(*values.values()), 0)
        while not all(used.values()):

            def worth(item, values=values, used=used):  # new values, then those that were used least
                return sum(not used[value] for value in values[item]), -sum(used[value] for value in values[item])

            best = max(combinations, key=worth)
            combinations.remove(best)
            for value in values[best]:
                used[value] += 1
        for item in combinations:
            item.add_marker("long")
    if "PYTEST_XDIST_WORKER" in os.environ:  # files go to the processes in this order: the largest must not be the last
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        sizes = {path: path.stat().st_size for path in {item.path for item in items}}
        items.sort(key=lambda item: (item.path not in slow, -sizes[item.path], str(item.path)))


def _imports_a_builder(path):
    names = _imported(path)
    root = pathlib.Path(__file__).parents[1]
    helpers = [root / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tests.")]
    return bool(names & BUILDERS) or any(_imports_a_builder(helper) for helper in helpers if helper.exists())


def _imported(path):
    """The names of all modules, and of what is taken from them, that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.fixture(scope="session")
def _programs(tmp_path_factory):
    """Where this process keeps what it compiled; of two, one would read what the other has half written."""
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(request, _programs):
    """A file that starts whole runs, or compiles train steps or samplers, finds the programs compiled that this process
    had before. Most are the same in both flavours.

    Not one that looks at programs themselves: what is loaded has the names and lines of where it was compiled.
    """
    names = _imported(request.path)
    is_often = names & COMPILED_OFTEN or "benchmarks" in request.path.name  # whose modules a fixture imports
    if not is_often or names & {"rl.run.executables", "rl.tools.programs.hlo"}:
        yield
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def use(settings):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # whether there is one is otherwise decided only once

    settings = {
        "jax_compilation_cache_dir": _programs,
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.1,  # what is faster compiled than read
    }
    before = {name: getattr(jax.config, name) for name in settings}
    use(settings)
    yield
    use(before)


# A process may have 65,530 memory maps (vm.max_map_count) and each compiled program takes about six; where none is
# left, the compiler crashes.
MOST_MAPS = 20_000


TESTS_BETWEEN = 5  # looks at the maps, which takes a moment; a test may add 7,000


@pytest.fixture(scope="session")
def _tests_since_a_look():
    return itertools.count()


@pytest.fixture(autouse=True)
def _room_for_programs(_tests_since_a_look):
    """Drops what earlier tests compiled before there is too much of it; one file alone may fill a process."""
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests_since_a_look) % TESTS_BETWEEN == 0 and maps.exists():
        with maps.open("rb") as lines:
            is_full = sum(1 for _ in lines) > MOST_MAPS
        if is_full:
            import jax

            jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _own_key(tmp_path_factory):
    """Run folders are signed with a key of the session's own, not with the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
