"""FASTDIV_LOG=1: one line per call on stderr: what was asked for, which backend ran and why, the shape of the tiles."""

from __future__ import annotations

import logging
import os


def configure() -> None:
    """Gives the `fastdiv` logger a handler if FASTDIV_LOG asks for it."""
    if os.environ.get("FASTDIV_LOG", "0") in ("", "0"):
        return
    logger = logging.getLogger("fastdiv")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fastdiv: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
