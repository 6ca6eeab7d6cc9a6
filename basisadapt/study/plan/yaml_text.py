"""YAML as studies and the command line write it."""

from __future__ import annotations

import collections
import re
from collections.abc import Hashable
from typing import Any, cast

import yaml

from basisadapt.core.errors import InputError
from basisadapt.core.settings import WHOLE


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, except that it reads 1e-3 as a number (YAML 1.1 requires 1.0e-3).

    It refuses aliases (*name), since a few lines of them can expand beyond memory or refer to themselves; integers that
    a record cannot hold; and duplicate keys.
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: yaml.Event = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"aliases are not supported{event.start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        counts = collections.Counter(key.value for key in keys)
        for key in keys:
            if counts[key.value] > 1:
                raise yaml.YAMLError(f"{key.value} is given more than once{key.start_mark}")
        return super().construct_mapping(node, deep)


def _whole(loader: Any, node: Any) -> int:
    value: int = loader.construct_yaml_int(node)
    if abs(value) >= WHOLE:
        raise yaml.YAMLError(f"a number beyond 64 bits{node.start_mark}")
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", cast(Any, _Loader.construct_yaml_str))  # a date stays text
for _tag in ("binary", "omap", "pairs", "set"):  # types that JSON lacks
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", cast(Any, _Loader.construct_undefined))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises InputError, which names `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise InputError(f"{where} is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # not all of a scalar's errors are YAML's own
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
