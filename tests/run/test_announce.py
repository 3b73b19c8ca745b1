"""The header of train, sft and eval, signs of life, and the end of a run."""

import threading
from types import SimpleNamespace

import pytest

from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.devices.mesh import create_mesh
from rl.models.flavours import policy_from_config
from rl.run.announce import header, tell_of_loss, warn_about_learning_rate, what_next
from rl.run.heartbeat import heartbeat
from rl.state.origin import find_origin

ARCH = (
    "{family: llama, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}"
)


def rows_of(*overrides: str, **options) -> dict[str, str]:
    config = load_config(None, [f"model.arch={ARCH}", "mesh.num_devices=1", *overrides])
    origin, mesh = find_origin(config, load_tokenizer("byte")), create_mesh(config.mesh)
    return header("runs/a", origin, policy_from_config(config, origin.model_config, mesh), mesh, **options)


def test_the_header_says_which_model_is_computed_where_and_what_trains():
    plain = rows_of()
    assert list(plain) == ["run folder", "model", "policy", "devices"]
    assert plain["model"].startswith("fresh, llama, ")
    adapted = rows_of("lora.rank=2", "lora.base_dtype=bfloat16")
    # A and B of rank 2: q 16 x 16, k and v 16 x 8, o 16 x 16, gate and up 16 x 24, down 24 x 16.
    num_trained = 2 * (32 + 24 + 24 + 32 + 40 + 40 + 40)
    assert adapted["adapters"].startswith(f"{num_trained} of ")
    assert adapted["adapters"].endswith("parameters train: rank 2, scale 16, on *_proj; frozen base in bfloat16")
    assert " are adapters: rank 2" in rows_of("lora.rank=2", is_trained=False)["adapters"]


def test_what_comes_next_names_the_run_as_a_shell_takes_it():
    assert "`grpo eval 'my runs/a'`" in what_next("grpo", "my runs/a")
    assert "`grpo train CONFIG model.source=runs/b/export`" in what_next("sft", "runs/b")


def test_something_that_takes_long_says_so_until_it_is_over():
    said, enough = [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            enough.set()

    with heartbeat(say, lambda: f"{len(said)} of 9 completions", every=0.001):
        assert enough.wait(60)
    count = len(said)
    assert [text.partition(":")[0] for text in said[:3]] == [f"{n} of 9 completions" for n in range(3)]
    assert said[0].endswith(" s so far")
    with heartbeat(said.append, "nothing"):
        pass
    assert len(said) == count, "what is short says nothing, and what is over says nothing more"


@pytest.mark.parametrize(
    ("num_parameters", "has_adapters", "lr", "is_named"),
    [
        (100_000_000, False, 2e-5, False),
        (100_000_000, False, 3e-5, True),
        (100_000_000, False, 5e-8, True),
        (99_000_000, False, 1e-2, False),
        (1_000_000, True, 5e-4, False),
        (1_000_000, True, 6e-4, True),
        (1_000_000, True, 5e-7, True),
    ],
)
def test_a_learning_rate_out_of_the_usual_range_is_named_at_the_start(num_parameters, has_adapters, lr, is_named):
    said, model = [], SimpleNamespace(num_parameters=num_parameters, lora=object() if has_adapters else None)
    console, policy = SimpleNamespace(warning=said.append), SimpleNamespace(config=model)
    warn_about_learning_rate(console, load_config(None, [f"optimizer.lr={lr}"]), policy)
    assert [text.split()[0] for text in said] == ["optimizer.lr"] * is_named
    warn_about_learning_rate(console, load_config(None, [f"optimizer.lr={lr}", "optimizer.name=sgd"]), policy)
    assert len(said) == is_named  # whose steps are of another size


def test_a_loss_near_0_is_explained_after_the_first_step_alone():
    said = []
    console = SimpleNamespace(message=said.append)
    for steps_done, loss in ((2, 0.0), (1, 0.5), (1, float("nan"))):
        tell_of_loss(console, steps_done, loss)
    assert said == []
    tell_of_loss(console, 1, -1e-9)
    assert [text.partition(":")[0] for text in said] == ["a loss near 0 is expected on-policy"]
