"""FASTDIV_LOG=1: one line per call on stderr: what was asked for, which backend ran and why, the shape of the tiles."""

from __future__ import annotations

import logging
import os

_LOG = logging.getLogger("fastdiv")


def configure() -> None:
    """Gives the `fastdiv` logger a handler if FASTDIV_LOG asks for it; else there are no records at all."""
    if os.environ.get("FASTDIV_LOG", "0") in ("", "0"):
        if _LOG.level == logging.NOTSET:
            _LOG.setLevel(logging.WARNING)
        return
    if not _LOG.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fastdiv: %(message)s"))
        _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)


def log(message: str, outputs: tuple[str, ...], *rest: object) -> None:
    """A line about a call; its text is made only if FASTDIV_LOG asks for it."""
    if _LOG.isEnabledFor(logging.INFO):
        _LOG.info(message, "+".join(outputs), *rest)
