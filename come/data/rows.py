"""Extracts the document of a dataset row: one text field, several joined fields, or a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Chat = list[dict[str, str]]
"""Messages in order, each with a `role` and a `content`."""
Document = str | Chat

_ROLES = (("role", "content"), ("from", "value"))  # key names of OpenAI and of ShareGPT


def row_document(row: Mapping[str, Any], fields: str) -> Document:
    """The document in one field of a row, or in several fields joined by newlines.

    Text is unchanged, bytes are decoded as UTF-8, a list of texts is joined by newlines, and a
    list of messages is a chat. Empty fields are skipped.

    Args:
        row: values by field name.
        fields: the name of a field, or several names separated by "+", for example
            "instruction+input+output".

    Raises:
        ValueError: a field is missing or contains neither text nor a chat, or a chat would have to
            be joined with other fields.
    """
    names = [fields] if fields in row else fields.split("+")
    found: list[Document] = []
    for name in names:
        if name not in row:
            raise ValueError(f"no field {name!r} in a row; there are {', '.join(map(str, row))}")
        try:
            document = _document(row[name])
        except ValueError as error:
            raise ValueError(f"field {name!r} {error}") from error
        if document:
            found.append(document)
    texts = [document for document in found if isinstance(document, str)]
    if len(texts) == len(found):
        return "\n".join(texts)
    if len(found) > 1:
        raise ValueError(f"fields {fields!r}: a chat cannot be joined with other fields")
    return found[0]


def document_text(
    document: Document, tokenizer: PreTrainedTokenizerBase | None, *, answer: bool = False
) -> str:
    """A document as text; a chat is rendered by the tokenizer's chat template.

    Args:
        document: text or a chat.
        tokenizer: provides the chat template.
        answer: whether the text ends with the beginning of the model's next turn.

    Raises:
        ValueError: the document is a chat, and there is no chat template or it fails.
    """
    if isinstance(document, str):
        return document
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            "the text is a chat (messages with roles), and the model's tokenizer has no chat "
            "template; name a field of plain text (calibration.field or eval.perplexity.field), or "
            "use a model with a template"
        )
    try:
        return str(
            tokenizer.apply_chat_template(document, tokenize=False, add_generation_prompt=answer)
        )
    except Exception as error:  # templates raise their own errors
        raise ValueError(
            f"the model's chat template cannot render a chat of the text: {error}"
        ) from error


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat of one word, as an example of what the chat template adds; "" without a template."""
    if not tokenizer.chat_template:
        return ""
    try:
        return document_text([{"role": "user", "content": "text"}], tokenizer)
    except ValueError:  # a template for other roles
        return ""


def _document(value: Any) -> Document:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"holds bytes that are no UTF-8 text ({error.reason})") from error
    if isinstance(value, Sequence):
        if all(isinstance(item, str) for item in value):
            return "\n".join(value)
        if all(isinstance(item, Mapping) for item in value):
            return [_message(item) for item in value]
    raise ValueError(
        f"holds {_kind(value)}; text, a list of texts, or a chat (messages with role and content) "
        "can be read"
    )


def _message(item: Mapping[str, Any]) -> dict[str, str]:
    for role, content in _ROLES:  # rows of a table have all keys; unused ones are null
        if isinstance(item.get(role), str):
            text = item.get(content)
            if isinstance(text, Sequence) and not isinstance(text, str | bytes):
                text = "".join(_part(part) for part in text)
            if text is None:
                text = ""
            if not isinstance(text, str):
                raise ValueError(  # noqa: TRY004 - the data's fault, not the caller's
                    f"has a message whose {content} is {_kind(text)}, not text"
                )
            return {"role": item[role], "content": text}
    raise ValueError(f"holds a list of records ({', '.join(map(str, item))}), which is no chat")


def _part(part: Any) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError("has a message with parts that are not text")


def _kind(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} ({shown[:40]}{'...' if len(shown) > 40 else ''})"
