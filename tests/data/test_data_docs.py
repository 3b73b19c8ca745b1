"""docs/data.md: every block of it is a file that its recipes use, or a recipe whose data loads."""

import pytest
import yaml

from rl.config.load import load_config
from rl.data.order import order_of
from rl.data.prompts import load_prompts
from rl.data.tokenizer import load_tokenizer
from tests.helpers.pages import blocks


@pytest.mark.long
def test_every_block_of_the_data_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, name, body in blocks("docs/data.md"):
        if name:
            (tmp_path / name).write_text(body)
        else:
            assert kind == "yaml", kind
            assert yaml.safe_load(body)
            (tmp_path / "recipe.yml").write_text(body)
            config = load_config(tmp_path / "recipe.yml")
            data = load_prompts(config, load_tokenizer("byte"))
            assert order_of(config.data, data, config.seed, 1).take(0, 1)[1] == 1
