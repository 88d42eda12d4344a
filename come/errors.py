"""Formats an exception of a library for a one-line error message."""

from __future__ import annotations

_LONGEST = 1000  # characters; some libraries quote whole files


def one_line(error: BaseException) -> str:
    """The whole message of an exception on one line, or its repr if the message is empty.

    All lines are kept, because libraries often put the cause on a later line. A message of more
    than 1000 characters is truncated.
    """
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
