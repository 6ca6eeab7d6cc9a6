"""Which linear modules of a transformer are adapted: placements, resolved from the names of a model's modules."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from basisadapt.errors import InputError, shown, unknown
from basisadapt.phi.sharing import AdaptedModule
from basisadapt.registry import Registry

PLACEMENTS: Registry[Placement] = Registry("placement")

# The projections of a transformer block: what each does (q, k, v, o of attention; gate, up, down of the MLP; a fused
# one does several) and its name inside the block. Heads and poolers lie outside the blocks (paper, section E.2).
FAMILIES = {
    "BERT, RoBERTa": {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    "Llama, Qwen2": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    "Phi-3": {
        "q k v": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    },
    "GPT-2": {"q k v": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    "GPT-NeoX": {
        "q k v": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    "CLIP": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    "ViT, DINOv2": {
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    "ViT, DINOv2 in earlier releases of transformers": {
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "o": "attention.output.dense",
        "gate up": "mlp.weights_in",
        "down": "mlp.weights_out",
    },
}
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = frozenset(ROLES[:4])
ROLES_OF = {path: frozenset(roles.split()) for family in FAMILIES.values() for roles, path in family.items()}
PROJECTION = re.compile(
    rf"(?P<stack>(?:.*\.)?(?:layers?|h))\.(?P<layer>\d+)\.(?P<path>{'|'.join(map(re.escape, ROLES_OF))})"
)


@dataclass(frozen=True)
class Projection:
    """A linear module of a block, at `path` inside it: in block `layer` of the `layers` blocks of a `stack`."""

    name: str
    stack: str
    layer: int
    layers: int
    path: str

    @property
    def roles(self) -> frozenset[str]:
        """What it computes: one of ROLES, or several."""
        return ROLES_OF[self.path]

    @property
    def kind(self) -> str:
        """ "attention" or "mlp"."""
        return "attention" if self.roles <= ATTENTION else "mlp"


class Placement(ABC):
    """A choice among a transformer's projections. Subclass it with a name, and with the roles it `needs`, if any.

    What follows a colon in a setting ("first_last:8") is the argument of the class.
    """

    needs: ClassVar[frozenset[str]]

    def __init_subclass__(cls, *, name: str | None = None, needs: Iterable[str] = (), **kwargs: Any) -> None:
        """Register the class under `name`. Raises InputError if it is taken."""
        super().__init_subclass__(**kwargs)
        cls.needs = frozenset(needs)
        if name is not None:
            PLACEMENTS.add(name, cls)

    @abstractmethod
    def covers(self, projection: Projection) -> bool:
        """Whether `projection` is adapted."""


class All(Placement, name="all"):
    """Every projection (the paper's default)."""

    def covers(self, projection: Projection) -> bool:
        """Always."""
        return True


class Attention(Placement, name="attention"):
    """The attention's projections."""

    def covers(self, projection: Projection) -> bool:
        """Of the attention."""
        return projection.kind == "attention"


class MLP(Placement, name="mlp"):
    """The MLP's projections."""

    def covers(self, projection: Projection) -> bool:
        """Of the MLP."""
        return projection.kind == "mlp"


class QKV(Placement, name="qkv", needs=("q", "k", "v")):
    """Queries, keys and values, apart or fused (paper, Table 19)."""

    def covers(self, projection: Projection) -> bool:
        """Into the attention."""
        return bool(projection.roles & self.needs)


class GateUp(Placement, name="gate_up", needs=("gate", "up")):
    """The gate and the projection beside it, apart or fused (paper, Table 19); for gated MLPs only."""

    def covers(self, projection: Projection) -> bool:
        """Into the MLP."""
        return bool(projection.roles & self.needs)


class Odd(Placement, name="odd"):
    """The blocks of odd index, counted from 0 as in the modules' names (paper, Table 23)."""

    def covers(self, projection: Projection) -> bool:
        """In a block of odd index."""
        return projection.layer % 2 == 1


class Even(Placement, name="even"):
    """The blocks of even index, counted from 0 as in the modules' names (paper, Table 23)."""

    def covers(self, projection: Projection) -> bool:
        """In a block of even index."""
        return projection.layer % 2 == 0


class FirstLast(Placement, name="first_last"):
    """ "first_last:K": the first K blocks and the last K (paper, Table 23, with K = 8)."""

    def __init__(self, count: str = "") -> None:
        if not count.isdecimal() or not 0 < len(count) < 10 or int(count) == 0:
            raise InputError(
                f'placement first_last must be "first_last:K" with K of at least 1, got {shown(count)} for K'
            )
        self.count = int(count)

    def covers(self, projection: Projection) -> bool:
        """In one of the outer blocks."""
        if 2 * self.count > projection.layers:
            raise InputError(
                f"placement first_last:{self.count} needs {2 * self.count} blocks, not {projection.layers}"
            )
        return projection.layer < self.count or projection.layer >= projection.layers - self.count


class Named(Placement):
    """The projections whose full names a regular expression matches as a whole."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)

    def covers(self, projection: Projection) -> bool:
        """By name."""
        return self.pattern.fullmatch(projection.name) is not None


def find_projections(names: Iterable[str]) -> list[Projection]:
    """The projections among the full names of a model's modules, in that order."""
    found = [match for name in names if (match := PROJECTION.fullmatch(name))]
    layers: dict[str, int] = {}
    for match in found:
        layers[match["stack"]] = max(layers.get(match["stack"], 0), int(match["layer"]) + 1)
    return [Projection(m[0], m["stack"], int(m["layer"]), layers[m["stack"]], m["path"]) for m in found]


def target_pattern(placement: str, names: Iterable[str]) -> str:
    """The regular expression that a placement's modules match, and no others, among the `names` of a model's modules.

    placement: a registered name, with its argument after a colon, or a regular expression over full names. Raises
    InputError for an unknown placement, one whose roles the model lacks, and a model without known projections.
    """
    projections = find_projections(names)
    if not projections:
        raise InputError(
            f"placement {placement!r} needs a model of a known family ({'; '.join(FAMILIES)}); "
            "for another, give target_modules"
        )
    chooser = _parse(placement)
    roles = frozenset().union(*(projection.roles for projection in projections))
    if missing := chooser.needs - roles:
        raise InputError(
            f"placement {placement!r} needs {_listed(missing)}, which this model has not; it has {_listed(roles)}"
        )
    chosen = [projection for projection in projections if chooser.covers(projection)]
    if not chosen:
        error = unknown("placement", placement, PLACEMENTS)
        raise InputError(f"{error}; as a regular expression it matches none of {len(projections)} projections")
    return _pattern(chosen)


def describe(name: str) -> AdaptedModule:
    """The kind and the block index of a module, from its name; kind "other" and no index for none of FAMILIES."""
    for projection in find_projections([name]):
        return AdaptedModule(name, projection.kind, projection.layer)
    return AdaptedModule(name, "other", None)


def _parse(placement: str) -> Placement:
    name, colon, argument = placement.partition(":")
    if name in PLACEMENTS:
        try:
            return PLACEMENTS[name](argument) if colon else PLACEMENTS[name]()  # type: ignore[call-arg]
        except TypeError as error:
            raise InputError(f"placement {name!r} takes no argument, got {shown(placement)}") from error
    try:
        return Named(placement)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"placement {shown(placement)} is neither a name nor a regular expression: {error}") from error


def _pattern(chosen: Sequence[Projection]) -> str:
    """Short where many blocks look alike: the paths that are chosen in the same blocks share one alternative."""
    layers: dict[tuple[str, str], list[str]] = {}
    for projection in chosen:
        layers.setdefault((projection.stack, projection.path), []).append(str(projection.layer))
    paths: dict[tuple[str, str], list[str]] = {}
    for (stack, path), blocks in layers.items():
        paths.setdefault((stack, "|".join(blocks)), []).append(re.escape(path))
    return "|".join(rf"{re.escape(stack)}\.(?:{blocks})\.(?:{'|'.join(p)})" for (stack, blocks), p in paths.items())


def _listed(roles: frozenset[str]) -> str:
    return ", ".join(sorted(roles, key=ROLES.index))
