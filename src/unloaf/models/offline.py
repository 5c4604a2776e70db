"""Networks are built from files without the network: what a file names is never fetched from a hub."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ONE_AT_A_TIME = threading.RLock()  # so that each puts back what was there before it
_OFFLINE = (
    "of a hub, and nothing is fetched to build a network from files; put the settings of what it names into the file "
    "itself (backbone_config instead of backbone), or give timm's own name of the architecture"
)


@contextmanager
def offline() -> Iterator[None]:
    """Nothing inside reaches a hub, as with HF_HUB_OFFLINE=1, which is read only when the library is loaded.

    Raises:
        ValueError: something inside asked for a hub.

    >>> import huggingface_hub
    >>> with offline():
    ...     huggingface_hub.is_offline_mode()
    True
    """
    from huggingface_hub import constants

    with _ONE_AT_A_TIME:
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
        try:
            yield
        except Exception as error:
            if is_of_hub(error):
                repository = re.search(r"://[^/]+/(?:api/models/)?([\w.-]+(?:/[\w.-]+)?)", str(error))
                named = repr(repository[1]) if repository else "something"
                raise ValueError(f"its config.json names {named} {_OFFLINE}") from error
            raise
        finally:
            constants.HF_HUB_OFFLINE = before


def is_of_hub(error: BaseException | None) -> bool:
    """Whether an error came of asking a hub, while that is not allowed."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None and not isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        error = error.__cause__
    return error is not None
