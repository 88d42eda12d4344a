"""How an error of a library becomes part of a one-line message."""

from __future__ import annotations

_LONGEST = 1000  # characters; some libraries quote whole files


def one_line(error: BaseException) -> str:
    """The whole message of an error on one line, or the error's class where it has no message.

    Libraries often put the cause on a later line, so no line is left out; a very long message is
    cut at its end.
    """
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
