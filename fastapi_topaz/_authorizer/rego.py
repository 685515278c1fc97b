"""
Checks names and references of Rego, the language of policies.

Topaz builds a query from the policy path and the decision of each request, and
evaluates it. Text that is more than a reference would run as code there. For example,
the path `myapp.GET.x.allowed == false #` turns a denial into an allow. So every path
and decision is checked before it is sent.

The grammar is at https://www.openpolicyagent.org/docs/policy-reference#grammar.
A reference is a name, followed by `.name` or `["any text"]` any number of times.
"""

from __future__ import annotations

import json
import re

from fastapi_topaz._checks import safe_repr


__all__ = ["check_name", "check_reference", "join"]


_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
# A JSON string. Control characters and lone surrogates must be escaped.
_STRING = r'"(?:[^"\\\x00-\x1f\ud800-\udfff]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})*"'
_REFERENCE = re.compile(rf"{_NAME}(?:\.{_NAME}|\[{_STRING}\])*")
_IDENTIFIER = re.compile(_NAME)
_BARE = re.compile(rf"{_NAME}|\[{_STRING}\]")

KEYWORDS = frozenset(
    {
        *("as", "contains", "default", "else", "every", "false", "if", "import", "in"),
        *("not", "null", "package", "some", "true", "with"),
    }
)
"""Reserved words of Rego. They cannot be names."""

_SHOWN = 200
"""Maximum characters of a wrong value in an error."""


def is_name(text: str) -> bool:
    """Return whether *text* is a Rego name."""
    return _IDENTIFIER.fullmatch(text) is not None and text not in KEYWORDS


def check_name(name: str, value: object) -> str:
    """
    Return *value* if it is a Rego name, such as a decision.

    Raises:
        TypeError: *value* is not a str. The message names the parameter *name*.
        ValueError: *value* is not a Rego name.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {_shown(value)}")
    if not is_name(value):
        raise ValueError(
            f"{name} must be a Rego name such as 'allowed': letters, digits and "
            f"underscores, and not a reserved word; got {_clipped(value)}"
        )
    return value


def check_reference(name: str, value: object) -> str:
    """
    Return *value* if it is a Rego reference, such as a policy path.

    Raises:
        TypeError: *value* is not a str. The message names the parameter *name*.
        ValueError: *value* is not a Rego reference.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {_shown(value)}")
    if not _REFERENCE.fullmatch(value) or not KEYWORDS.isdisjoint(_BARE.findall(value)):
        raise ValueError(
            f"{name} must be a Rego reference such as 'myapp.GET.documents'; write "
            "each later part that is not a Rego name in quotes, as in "
            f"'myapp.GET[\"user-profiles\"]'; got {_clipped(value)}"
        )
    return value


def join(root: str, *segments: str) -> str:
    """Return the reference *root*, extended by *segments*, which may be any text."""
    return root + "".join(map(_part, segments))


def _part(segment: str) -> str:
    if is_name(segment):
        return f".{segment}"
    return f"[{json.dumps(segment, ensure_ascii=False)}]"


def _shown(value: object) -> str:
    # A mapping or an object may be a resource context or an identity, if a caller has
    # confused the arguments. Then only its type is shown.
    harmless = value is None or isinstance(value, int | float)
    return safe_repr(value) if harmless else f"a {type(value).__name__}"


def _clipped(value: object) -> str:
    text = safe_repr(value)
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}... ({len(text)} characters)"
