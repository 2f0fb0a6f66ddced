"""Errors cross processes: whoever receives one sees what was raised, with its attributes."""

import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

import raydmd
from raydmd.errors import nearest_text, portable
from raydmd.serving.app import _translated
from raydmd.serving.contract import BadRequest
from raydmd.serving.http.errors import as_api_error


class TwoParts(Exception):
    """An error as libraries have them: its constructor takes more than its message."""

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


def every_error() -> list[type[Exception]]:
    """Return every exception class of the package."""
    for module in pkgutil.walk_packages(raydmd.__path__, "raydmd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, waiting = set(), [Exception]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.partition(".")[0] == "raydmd":
                found.add(kind)
    return sorted(found, key=str)


VALUES = {str: "words", int: 3, float: 2.5, bool: True, dict: {"a": "b"}}


def sample(kind: type[Exception]) -> Exception:
    """Return an error, made with a value for each argument that its constructor names."""
    if kind.__init__ is Exception.__init__:
        return kind("words")
    hints, arguments = get_type_hints(kind.__init__), {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        assert parameter.kind is not parameter.VAR_KEYWORD
        hint = hints[name]
        found = [value for known, value in VALUES.items() if known.__name__ in str(hint)]
        arguments[name] = get_args(hint)[-1] if get_origin(hint) is Literal else found[0]
    return kind(**arguments)


@pytest.mark.parametrize("through", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind: type[Exception], through: Any) -> None:
    error = sample(kind)
    again = through.loads(through.dumps(error))
    assert type(again) is kind and str(again) == str(error) and again.args == error.args
    assert vars(again) == vars(error)


def test_the_walk_finds_errors_everywhere() -> None:
    assert {"UserError", "BadRequest", "Overloaded", "ApiError", "NoRevision", "StepDropped"} <= {
        k.__name__ for k in every_error()
    }


def through_ray(error: Exception) -> RayError:
    """Return what a caller gets of an actor's error."""
    return RayError.from_bytes(RayTaskError("run", "its traceback", error).to_bytes())


def test_a_refusal_by_a_stage_is_the_same_for_the_api() -> None:
    got = _translated(through_ray(BadRequest("no prompt 'elephant'", "prompt")))
    assert isinstance(got, BadRequest) and got.param == "prompt"
    told = as_api_error(got, "req")
    assert (told.status, told.message, told.param) == (400, "no prompt 'elephant'", "prompt")


@pytest.mark.parametrize("make", [lambda: TwoParts("broken", "disk"), lambda: local_error()])
def test_a_library_s_error_arrives_in_words(make: Callable[[], Exception]) -> None:
    error = make()
    with pytest.raises((TypeError, pickle.PicklingError, AttributeError)):  # as it is, it would not arrive
        pickle.loads(pickle.dumps(error))
    again = pickle.loads(pickle.dumps(portable(error)))
    assert type(error).__name__ in str(again) and "broken" in str(again)
    assert portable(known := ValueError("x")) is known


def local_error() -> Exception:
    class Here(Exception):
        """Known to this call alone."""

    return Here("broken")


def test_of_many_texts_the_nearest_is_named_or_one() -> None:
    texts = [f"a picture of number {number} in a long list" for number in range(2000)]
    assert nearest_text("a picture of nomber 7 in a long list", texts).startswith("; did you mean 'a picture of number")
    assert nearest_text("wolf", texts) == f" (one of 2000, e.g. '{texts[0]}')"
    assert nearest_text("wolf", ["a fox", "an owl"]) == " (one of: a fox, an owl)"
    assert len(nearest_text("x" * 500, ["x" * 499])) == 200
