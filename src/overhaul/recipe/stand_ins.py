"""What a method is given while a recipe is only planned: networks without their weights, and what is not made yet.

1. A network of a moderate size has random numbers, so that a method finds in it all that does not depend on what was learnt.
   A larger one is built of fake tensors, which have shapes and no values: what asks for a value is left to the run.
2. A product or a model that an earlier step makes ends the planning of a method as soon as it is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, Never, TypeVar

from torch import nn

from overhaul import models
from overhaul.errors import OverhaulError, RequestError
from overhaul.session import WorkBegins
from overhaul.weights.depths import built_names

DRAWN = 20_000_000
"""Parameters up to which a network gets random numbers."""

FAKE = "torch._subclasses.fake_tensor"
"""The module of fake tensors and of what they raise, which takes a second to import."""

Result = TypeVar("Result")


class Networks:
    """Networks as their config.json describes them, with other numbers or none."""

    @cached_property
    def mode(self) -> Any:
        """Inside it, tensors are fake."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, known: models.Checkpoint) -> nn.Module | None:
        """The network of a checkpoint, in eval mode; None where its code is not to be run.

        Raises:
            RequestError: none can be built, or the files lack some of its tensors.
        """
        if known.base is not None:  # an adapter becomes part of its weights
            return self.of(known.base)
        if "quantization_config" in known.config:  # its files hold other tensors than what it opens as
            return None
        built = models.planned(known)
        if built is None:
            return None
        if not known.is_new:
            _check_whole(known, built)
        if known.parameters <= DRAWN:
            return models.drawn(known).eval()
        with self.mode:
            return built.to_empty(device="cpu").eval()


def _check_whole(known: models.Checkpoint, built: Any) -> None:
    """Whether the files hold all tensors of the class, by the names that the library gives them."""
    ties = getattr(built, "all_tied_weights_keys", None) or {}
    if (
        built.state_dict().keys() - ties.keys() <= known.shapes.keys()
    ):  # to ask for other names takes a tenth of a second
        return
    held = {*built_names(built, known.shapes).values(), *ties}
    spared = getattr(built, "_keys_to_ignore_on_load_missing", None) or ()
    lost = [name for name in built.state_dict() if name not in held and not any(re.search(one, name) for one in spared)]
    if lost:
        raise RequestError(
            f"{known.source}: the weights lack {len(lost)} tensors of {known.architecture}, such as {lost[0]!r}. Fetch or "
            "save the model again, or name the class that was saved in config.json (`architectures`)."
        )


class NotYet:
    """A material that an earlier step makes: nothing is known of it before the run."""

    def _unknown(self, *_: Any, **__: Any) -> Never:
        raise WorkBegins

    __getattr__ = __len__ = __iter__ = __bool__ = __getitem__ = __call__ = __str__ = __repr__ = __fspath__ = _unknown


def told(work: Callable[[], Result], where: str) -> Result | None:
    """What some work gives while it is planned; None where it comes to an end before. What it refuses is told, with `where`.

    Raises:
        RequestError: the work refuses what it is given.
    """
    try:
        return work()
    except WorkBegins:
        return None
    except RequestError as error:
        if lacks_numbers(error):
            return None
        raise RequestError(f"{where}{error}") from error
    except OverhaulError:  # it was found out under way, where nothing was
        return None
    except Exception:  # numbers are missing, or the run will tell
        return None


def lacks_numbers(error: BaseException | None) -> bool:
    """Whether an error comes of tensors that have no values."""
    while error is not None:
        if isinstance(error, NotImplementedError) or type(error).__module__ == FAKE:
            return True
        error = error.__cause__ or error.__context__
    return False
