"""The trackers of a run: made from `logging.trackers`, given each step, and ended with the run.

In: the configuration, a run, its steps. Out: calls of the trackers, each in its thread (`rl.run.trackers.delivery`).
Libraries are imported here by name, and only those that the configuration asks for.
"""

import functools
import importlib
import inspect
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rewards.importing import import_function
from rl.config.load import Config
from rl.config.sections import TRACKER_NAMES, is_user_function
from rl.files.json_file import shown
from rl.run.trackers.contract import TrackedRun, TrackedStep, Tracker
from rl.run.trackers.delivery import Delivery, described

_TO_END_AT_ONCE = 1.0  # seconds for trackers where the user does not want to wait


class Trackers:
    """The trackers that a configuration names, none of which is made yet.

    Raises:
      ValueError: a library is missing, a file does not import, or a tracker does not take its settings.
    """

    def __init__(self, config: Config):
        section = config.logging
        self._wait_seconds, self._num_waiting = section.tracker_wait_seconds, section.tracker_queue
        self._makers: dict[str, Callable[[TrackedRun], Tracker]] = {
            name: _maker(name, dict(section.tracker_args.get(name, {}))) for name in section.trackers
        }
        self._own = {name for name in section.trackers if is_user_function(name)}
        self._deliveries: list[Delivery] = []

    @property
    def names(self) -> list[str]:
        """The trackers, as the configuration names them."""
        return list(self._makers)

    @property
    def labels(self) -> list[str]:
        """Their short names, as in messages and metrics."""
        return list(_labels(self.names).values())

    def start(self, run: TrackedRun) -> None:
        """Has each tracker made in its thread.

        Raises:
          ValueError: a tracker of the user's raised, or returned something else. Nobody waits for one that takes longer
            than `logging.tracker_wait_seconds`, nor for one of the toolkit, which may have to reach a server.
        """
        labels = _labels(self.names)
        for name, maker in self._makers.items():
            self._deliveries.append(Delivery(labels[name], functools.partial(maker, run), self._num_waiting))
        for name, delivery in zip(self._makers, self._deliveries, strict=True):
            if name in self._own and delivery.made.wait(self._wait_seconds) and delivery.first_error is not None:
                error = delivery.first_error
                if isinstance(error, _WrongResultError):
                    raise ValueError(str(error)) from error
                raise ValueError(
                    f"logging.trackers {name} must not raise when it is made, got {described(error)}; --traceback "
                    "shows all of it"
                ) from error

    def put(self, step: TrackedStep) -> None:
        """Hands a step to each tracker, and returns at once."""
        for delivery in self._deliveries:
            delivery.put(step)

    def metrics(self) -> dict[str, int]:
        """{"trackers/NAME/dropped": the steps so far that did not reach the tracker, since this start of the run}."""
        return {f"trackers/{delivery.label}/dropped": delivery.num_dropped for delivery in self._deliveries}

    def places(self) -> list[str]:
        """Where trackers keep the run, as far as it is known and was not told yet."""
        return [place for delivery in self._deliveries for place in delivery.places()]

    def problems(self) -> list[str]:
        """What went wrong since the last call."""
        return [problem for delivery in self._deliveries for problem in delivery.problems()]

    def end(self, is_failed: bool, is_in_a_hurry: bool, say: Callable[[str], None]) -> list[str]:
        """Ends the trackers, and returns what is to be warned about. Waits `logging.tracker_wait_seconds` for all of
        them together.

        Args:
          is_failed: whether the run ended in an error.
          is_in_a_hurry: whether to wait for a moment only.
          say: is called before a longer wait.
        """
        for delivery in self._deliveries:
            delivery.end(is_failed)
        seconds = min(self._wait_seconds, _TO_END_AT_ONCE) if is_in_a_hurry else self._wait_seconds
        deadline = time.monotonic() + seconds
        late = [delivery for delivery in self._deliveries if not delivery.wait(min(_TO_END_AT_ONCE, seconds))]
        if late and not is_in_a_hurry:
            names = ", ".join(delivery.label for delivery in late)
            say(f"waiting for {names} to take the last steps, at most {seconds:g} s (logging.tracker_wait_seconds)")
        left = [delivery for delivery in late if not delivery.wait(deadline - time.monotonic())]
        for place in self.places():
            say(place)
        problems = self.problems()
        for delivery in left:
            delivery.leave()
            self._leave(delivery.label)
        for delivery in self._deliveries:
            num_lacking = delivery.num_dropped + (delivery.num_undelivered if delivery in left else 0)
            lacking = (
                f"lacks {num_lacking} {'step' if num_lacking == 1 else 'steps'} of this start of the run; "
                f"metrics.jsonl has {'it' if num_lacking == 1 else 'them'}"
            )
            if delivery in left:
                state = lacking if num_lacking else "has every step"
                problems.append(f"tracker {delivery.label} has not ended after {seconds:g} s, and is left; it {state}")
            elif num_lacking:
                problems.append(f"tracker {delivery.label} {lacking}")
        self._deliveries = []
        return problems

    def _leave(self, label: str) -> None:
        if label in TRACKER_NAMES:
            leave = getattr(_module(label), "leave", None)
            if leave is not None:
                leave()


class _WrongResultError(TypeError):
    """What a user's function returned is no tracker; the message says everything."""


def _labels(names: list[str]) -> dict[str, str]:
    """Short names for messages and metrics: the function's, of a user's tracker, or its file's and its own."""
    short = {name: name.rpartition(":")[2] for name in names}
    twice = {label for label in short.values() if list(short.values()).count(label) > 1}
    return {name: name.replace("/", "_") if label in twice else label for name, label in short.items()}


def _maker(name: str, settings: dict[str, Any]) -> Callable[[TrackedRun], Tracker]:
    """A function that makes the tracker; ValueError where that cannot work."""
    if is_user_function(name):
        function = import_function(name, "logging.trackers")
        _check_arguments(function, f"logging.trackers {name}", name, settings, ("run",))
        return functools.partial(_make_own, function, name, settings)
    module = _module(name)
    _check_arguments(module.Settings, f"logging.trackers {name}", name, settings, ())
    typed = module.Settings(**settings)
    module.check(typed)
    return functools.partial(module.make, typed)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.to_{name}")


def _check_arguments(
    function: Callable[..., Any], label: str, name: str, settings: Mapping[str, Any], given: tuple[str, ...]
) -> None:
    try:
        inspect.signature(function).bind(*given, **settings)
    except TypeError as error:
        parameters = [key for key in inspect.signature(function).parameters if key not in given]
        raise ValueError(
            f"{label} must take ({', '.join((*given, '**settings'))}) with the settings of logging.tracker_args."
            f"{name}, got {shown(sorted(map(str, settings)))}: {error}; it takes {shown(parameters)}"
        ) from error


def _make_own(function: Callable[..., Any], name: str, settings: dict[str, Any], run: TrackedRun) -> Tracker:
    tracker = function(run, **settings)
    missing = [method for method in ("log", "close") if not callable(getattr(tracker, method, None))]
    if missing:
        raise _WrongResultError(
            f"logging.trackers {name} must return an object with the methods log and close, got a "
            f"{type(tracker).__name__} without {' and '.join(missing)}"
        )
    return tracker
