"""An extension of Griffe that shows the signatures of attrs classes."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe


KINDS = {
    inspect.Parameter.POSITIONAL_OR_KEYWORD: (
        griffe.ParameterKind.positional_or_keyword
    ),
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
}


class AttrsSignatures(griffe.Extension):
    """
    Adds the constructor that attrs makes.

    Griffe reads the sources and does not run them, so it sees no constructor.
    """

    def on_class(self, *, cls: griffe.Class, **_arguments: Any) -> None:
        """Add `__init__` to a class that is decorated with `attrs`."""
        decorators = [str(each.value) for each in cls.decorators]
        if not any(each.startswith("attrs.") for each in decorators):
            return
        try:
            module = importlib.import_module(cls.module.path)
        except ImportError:
            return  # it needs an extra that is not installed, such as `_cli`
        made = inspect.signature(getattr(module, cls.name))
        parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    each.name,
                    annotation=str(each.annotation),
                    kind=KINDS[each.kind],
                    default=None if each.default is each.empty else _shown(each),
                )
                for each in made.parameters.values()
            )
        )
        # Without a parent or with another name, it would not be found.
        cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def _shown(parameter: inspect.Parameter) -> str:
    """Return the default as text. attrs shows a factory as NOTHING."""
    text = repr(parameter.default)
    return "..." if "NOTHING" in text or text.startswith("<") else text
