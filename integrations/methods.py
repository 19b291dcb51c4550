"""The token_advantages of EGSW, GTPO and GRPO-S with options that a user of another trainer has given."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import partial
from inspect import signature
from typing import Any, get_args

from torch import Tensor

import egsw
import grpo_s
import gtpo
from harness.options import bounded

SCRIPTS: dict[str, Any] = {"egsw": egsw, "gtpo": gtpo, "grpo_s": grpo_s}


def token_advantages(method: str, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The script's function (rewards, entropy, mask, group) -> [B, T] with these options. ValueError for an option that
    it does not have, and for a value that the script's command line would refuse."""
    function = SCRIPTS[method].token_advantages
    names = list(signature(function).parameters)[4:]
    known = {field.name: field for field in fields(SCRIPTS[method].Config) if field.name in names}
    wrong = [name for name, value in options.items() if name not in known or not allowed(known[name], value)]
    if wrong:
        raise ValueError(f"{method} has the options {', '.join(known)}, as in its --help; wrong: {', '.join(wrong)}")
    return partial(function, **options)


def allowed(field: Field, value: Any) -> bool:
    """Whether the script's command line would take this value."""
    if isinstance(value, str) or value is None:
        return value in get_args(field.type) or value is field.default
    try:
        bounded(float, **field.metadata["bounds"])(value)
    except (ArgumentTypeError, TypeError, ValueError):
        return False
    return True
