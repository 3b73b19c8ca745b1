"""What a checkpoint remembers of the loop."""

import json

from rl.algorithms.entropy_coef import EntropyCoefState
from rl.config.load import load_config
from rl.run.health import HealthState
from rl.run.progress import Progress

HEALTH = HealthState(3, 1, {"kl": [0.5, 0.25]}, {"entropy": 2})
FOUND = {"reward_calls": {"even": "whole_batch"}, "reward_doubts": {"even": {"left": 7, "highest": 1.0}}}
FOUND |= {"reward_steps_down": {"even": 2}}


def through_json(record):
    return json.loads(json.dumps(record))


def test_a_loop_comes_back_from_its_record_as_it_was_with_its_position_in_the_epoch():
    loop = Progress(7, HEALTH, 25, EntropyCoefState(0.5, 1.5), FOUND)
    record = through_json(loop.record("nnx", num_rows=10))
    assert (record["epoch"], record["position"], record["flavour"]) == (2, 5, "nnx")
    assert Progress.restored(record, load_config(None), num_rows=10) == loop


def test_a_loop_that_found_nothing_about_rewards_starts_with_nothing():
    start = Progress.start(load_config(None, ["grpo.entropy_coef=0.25"]))
    record = through_json(start._replace(steps_done=1).record("linen", num_rows=10))
    assert Progress.restored(record, load_config(None), num_rows=10).reward_state == {}
    assert start.entropy.coef == 0.25


def test_supervised_fine_tuning_remembers_step_and_health_alone():
    loop = Progress.start(load_config(None))._replace(steps_done=4, health=HEALTH)
    record = through_json(loop.supervised_record("linen"))
    assert record.keys() == {"step", "flavour", "health"}
    assert Progress.restored(record, load_config(None), num_rows=10) == loop
