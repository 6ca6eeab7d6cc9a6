"""Which linear modules of a transformer are adapted: placements, resolved from a model's modules and their names."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from basisadapt.core.errors import InputError, refusing, shown, unknown
from basisadapt.core.grouping import grouped
from basisadapt.core.registry import Registered, Registry
from basisadapt.phi.sharing import AdaptedModule

PLACEMENTS: Registry[Placement] = Registry("placement")

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = frozenset(ROLES[:4])

# The roles of the linear layers in a transformer's block (q, k, v, o of attention; gate, up, down of the MLP; a fused
# layer has several): the modules in the block ("" is the block itself), and their layers' names by role. Attention
# and MLP are listed separately, since families combine them. Heads and poolers lie outside the blocks (paper, section
# E.2). If a block has a linear layer that is not listed, no part of it is adapted.
FAMILIES: dict[str, tuple[list[str], dict[str, str]]] = {
    "BERT, RoBERTa": (
        ["attention.self", "crossattention.self", "attention.attention", "crossattention.attention"],
        {"q": "query", "k": "key", "v": "value"},
    ),
    "BERT's output": (["attention.output", "crossattention.output"], {"o": "dense"}),
    "DeBERTa-v2": (["attention.self"], {"q": "query_proj", "k": "key_proj", "v": "value_proj", "q k v": "in_proj"}),
    "Longformer": (["attention.self"], {"q": "query_global", "k": "key_global", "v": "value_global"}),
    "LUKE": (["attention.self"], {"q": "w2e_query e2w_query e2e_query"}),
    "LED": (
        ["self_attn.longformer_self_attn"],
        {"q": "query query_global", "k": "key key_global", "v": "value value_global"},
    ),
    "BigBird-Pegasus": (["self_attn.self"], {"q": "query", "k": "key", "v": "value"}),
    "MPNet": (["attention.attn"], {"q": "q", "k": "k", "v": "v", "o": "o"}),
    "DistilBERT, XLM": (["attention", ""], {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"}),
    "ALBERT, V-JEPA 2": (["attention"], {"q": "query", "k": "key", "v": "value", "o": "proj dense"}),
    "Llama, Qwen2, CLIP, OPT, BART, Whisper": (
        ["self_attn", "encoder_attn", "cross_attn", "self_attention", "cross_attention"],
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj out_proj"},
    ),
    "Phi, Janus, LED": (["self_attn"], {"o": "dense projection_layer output"}),
    "ViT, DINOv2, Wav2Vec2": (["attention"], {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj out_proj"}),
    "GPT-J, ModernBERT's decoder": (["attn"], {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj proj Wo"}),
    "GPT-Neo": (["attn.attention"], {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}),
    "DeepSeek-V2": (["self_attn"], {"q": "q_a_proj q_b_proj", "k v": "kv_a_proj_with_mqa kv_b_proj"}),
    "T5": (
        ["layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.0.LocalSelfAttention"],
        {"q": "q", "k": "k", "v": "v", "o": "o"},
    ),
    "GPT-2": (["attn", "crossattention"], {"q k v": "c_attn", "o": "c_proj"}),
    "Phi-3": (["self_attn"], {"q k v": "qkv_proj", "o": "o_proj"}),
    "CodeGen": (["attn"], {"q k v": "qkv_proj", "o": "out_proj"}),
    "GPT-NeoX, BLOOM, Falcon, Persimmon": (
        ["attention", "self_attention", "self_attn"],
        {"q k v": "query_key_value", "o": "dense"},
    ),
    "ModernBERT, MPT": (["attn"], {"q k v": "Wqkv", "o": "Wo out_proj"}),
    "Qwen2-VL's tower, SAM, ViTDet": (["attn", "attention"], {"q k v": "qkv", "o": "proj"}),
    "BLIP's tower": (["self_attn"], {"q k v": "qkv", "o": "projection"}),
    "Bark": (["attn"], {"q k v": "att_proj", "o": "out_proj"}),
    "MLP of BERT, RoBERTa": (["intermediate"], {"up": "dense"}),
    "MLP's output of BERT, RoBERTa": (["output"], {"down": "dense"}),
    "MLP of Llama, Qwen2, GLM": (
        ["mlp", "ffn", "feed_forward"],
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "gate up": "gate_up_proj"},
    ),
    "MLP of CLIP, ViT, OPT, BART, Whisper": (["mlp", "", "ffn"], {"up": "fc1", "down": "fc2"}),
    "MLP of ViT, DINOv2 in earlier releases": (["mlp"], {"gate up": "weights_in", "down": "weights_out"}),
    "MLP of GPT-2, StarCoder2": (["mlp"], {"up": "c_fc", "down": "c_proj"}),
    "MLP of GPT-NeoX, BLOOM, Falcon": (["mlp"], {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}),
    "MLP of GPT-J, CodeGen": (["mlp"], {"up": "fc_in", "down": "fc_out"}),
    "MLP of ModernBERT": (["mlp"], {"gate up": "Wi", "down": "Wo"}),
    "MLP of Bark": (["mlp"], {"up": "in_proj", "down": "out_proj"}),
    "MLP of ALBERT": ([""], {"up": "ffn", "down": "ffn_output"}),
    "MLP of SAM, DistilBERT, XLM": (["mlp", "ffn", ""], {"up": "lin1", "down": "lin2"}),
    "MLP of Qwen3-VL's tower": (["mlp"], {"up": "linear_fc1", "down": "linear_fc2"}),
    "MLP of LFM2": (["feed_forward"], {"gate": "w1", "up": "w3", "down": "w2"}),
    "MLP of Wav2Vec2": (["feed_forward"], {"up": "intermediate_dense", "down": "output_dense"}),
    "MLP of T5": (
        ["layer.1.DenseReluDense", "layer.2.DenseReluDense"],
        {"up": "wi wi_1", "gate": "wi_0", "down": "wo"},
    ),
}
ROLES_OF = {
    f"{module}.{name}".removeprefix("."): frozenset(roles.split())
    for modules, linear in FAMILIES.values()
    for module in modules
    for roles, names in linear.items()
    for name in names.split()
}
MIXTURE = frozenset(ROLES[4:])
EXPERTS = re.compile(r".*\.experts?")
_IN_BLOCK = r"(?P<stack>(?:.*\.)?[^.]+)\.(?P<layer>\d+)\.(?P<path>"
PROJECTION = re.compile(_IN_BLOCK + "|".join(map(re.escape, ROLES_OF)) + ")")
BLOCK = re.compile(_IN_BLOCK + ".+)")
MAX_LISTED = 8
WAY_OUT = 'target_modules="all-linear" adapts all linear layers but the head'


@dataclass(frozen=True)
class Projection:
    """A linear module of a block. A mixture of experts counts as one, so that placements can cover it.

    - `name` (str): its full name.
    - `stack` (str): the name of the stack of blocks.
    - `layer` (int): the index of its block.
    - `layers` (int): the number of blocks in the stack.
    - `path` (str): its name inside the block.
    - `roles`: one or several of ROLES.
    """

    name: str
    stack: str
    layer: int
    layers: int
    path: str
    roles: frozenset[str]

    @property
    def kind(self) -> str:
        """ "attention" or "mlp"."""
        return "attention" if self.roles <= ATTENTION else "mlp"


@dataclass(frozen=True)
class Blocks:
    """The modules in a model's blocks: projections, mixtures of experts, and the names of others with products."""

    projections: list[Projection]
    mixtures: list[Projection]
    others: list[str]


class Placement(Registered, ABC):
    """A choice among a transformer's projections. Subclass it with a name, and with the roles it `needs`, if any.

    What follows a colon in a setting ("first_last:8") is the argument of the class.
    """

    registry = PLACEMENTS
    needs: ClassVar[frozenset[str]]

    def __init_subclass__(cls, *, needs: Iterable[str] = (), **kwargs: Any) -> None:
        """Register the class as `Registered` does, with the roles that it needs."""
        cls.needs = frozenset(needs)
        super().__init_subclass__(**kwargs)

    @abstractmethod
    def covers(self, projection: Projection) -> bool:
        """Whether `projection` is adapted."""

    def misses(self, name: str) -> bool:
        """Whether the placement could miss the module `name` of a block, whose role is not known."""
        return True


class All(Placement, name="all"):
    """Every projection (the paper's default)."""

    def covers(self, projection: Projection) -> bool:
        """Every projection is."""
        return True


class Attention(Placement, name="attention"):
    """The attention's projections."""

    def covers(self, projection: Projection) -> bool:
        """The attention's projections are."""
        return projection.kind == "attention"


class MLP(Placement, name="mlp"):
    """The MLP's projections."""

    def covers(self, projection: Projection) -> bool:
        """The MLP's projections are."""
        return projection.kind == "mlp"


class QKV(Placement, name="qkv", needs=("q", "k", "v")):
    """Queries, keys and values, apart or fused (paper, Table 19)."""

    def covers(self, projection: Projection) -> bool:
        """Projections with one of the roles q, k and v are."""
        return bool(projection.roles & self.needs)


class GateUp(Placement, name="gate_up", needs=("gate", "up")):
    """The gate and the projection beside it, apart or fused (paper, Table 19); for gated MLPs only."""

    def covers(self, projection: Projection) -> bool:
        """Projections with one of the roles gate and up are."""
        return bool(projection.roles & self.needs)


class Odd(Placement, name="odd"):
    """The blocks of odd index, counted from 0 as in the modules' names (paper, Table 23)."""

    def covers(self, projection: Projection) -> bool:
        """Projections in blocks of odd index are."""
        return projection.layer % 2 == 1


class Even(Placement, name="even"):
    """The blocks of even index, counted from 0 as in the modules' names (paper, Table 23)."""

    def covers(self, projection: Projection) -> bool:
        """Projections in blocks of even index are."""
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
        """Projections in the outer blocks are. Raises InputError if the stack has fewer than 2 K blocks."""
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
        """Projections with a matching name are."""
        return self.misses(projection.name)

    def misses(self, name: str) -> bool:
        """Modules with a matching name are missed, whatever their role."""
        return self.pattern.fullmatch(name) is not None


def find_projections(names: Iterable[str]) -> list[Projection]:
    """The projections among the full names of a model's modules, in that order."""
    return _projections({name: ROLES_OF[match["path"]] for name in names if (match := PROJECTION.fullmatch(name))})


def find_blocks(model: nn.Module) -> Blocks:
    """The modules with products in a model's blocks (the elements of its stacks), adapted or not."""
    inside = dict(_inside_blocks(model))
    mixtures = dict.fromkeys(map(_mixture, filter(EXPERTS.fullmatch, inside)), MIXTURE)
    projections: list[str] = []
    others: list[str] = []
    for name, module in inside.items():
        if any(f"{name}.".startswith(f"{mixture}.") for mixture in mixtures):
            continue
        linear, known = isinstance(module, (nn.Linear, Conv1D)), PROJECTION.fullmatch(name)
        if known and (linear or not (any(module.children()) or isinstance(module, _ConvNd))):
            projections.append(name)
        elif linear or _multiplies(module, known is not None):
            others.append(name)
    found = find_projections(projections)
    others += [projection.name for projection in found if not _fits(projection, found, inside)]
    return Blocks(find_projections(name for name in projections if name not in others), _projections(mixtures), others)


def _inside_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The name and module of everything inside the blocks; for an adapted module, its base layer."""
    stacks, blocks = set(), set()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if parent in blocks:
            yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if (parent in blocks or (name and parent in stacks)) and not isinstance(module, BaseTunerLayer):
            blocks.add(name)
        if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and _alike(module)):
            stacks.add(name)


def _fits(projection: Projection, known: Sequence[Projection], modules: Mapping[str, nn.Module]) -> bool:
    """Whether the MLP's input projections fit its output in width: in some families "fc1" is gate and up in one."""
    into = len(projection.roles & {"gate", "up"})
    block = [other for other in known if (other.stack, other.layer) == (projection.stack, projection.layer)]
    widths = {_sides(modules[other.name])[0] for other in block if "down" in other.roles} - {None}
    wide = _sides(modules[projection.name])[1]
    return not (into and wide and widths) or wide in {into * width for width in widths if width}


def _sides(module: Any) -> tuple[int | None, int | None]:
    """in_features and out_features; None for one that the module does not state."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return getattr(module, "in_features", None), getattr(module, "out_features", None)


def _alike(modules: nn.Sequential) -> bool:
    return len(modules) > 1 and len({type(module) for module in modules}) == 1


def _multiplies(module: nn.Module, known: bool) -> bool:
    """Whether a module that is not linear has products: of its own tensors, as experts, or as a convolution.

    known: a projection has its name, as which a convolution counts only then.
    """
    if isinstance(module, _ConvNd):
        return known
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    return isinstance(module, nn.MultiheadAttention) or any(len(shape) > 2 and min(shape) > 1 for shape in shapes)


def _mixture(experts: str) -> str:
    """The MLP of experts, with router and shared experts; the experts alone if they are in the block itself."""
    parent = experts.rpartition(".")[0]
    return experts if parent.rpartition(".")[2].isdecimal() else parent


def _projections(roles: Mapping[str, frozenset[str]]) -> list[Projection]:
    """The projections with these full names, each with its roles."""
    found = {name: match for name in roles if (match := PROJECTION.fullmatch(name) or BLOCK.fullmatch(name))}
    layers: dict[str, int] = {}
    for match in found.values():
        layers[match["stack"]] = max(layers.get(match["stack"], 0), int(match["layer"]) + 1)
    return [
        Projection(name, m["stack"], int(m["layer"]), layers[m["stack"]], m["path"], roles[name])
        for name, m in found.items()
    ]


def target_pattern(placement: str, model: nn.Module) -> str:
    """The regular expression that matches a placement's modules and no others of the model.

    placement: a registered name, with its argument after a colon, or a regular expression over full names. Raises
    InputError for an unknown placement, one whose roles the model lacks, and one that might cover only a part of what
    it names: for a placement by roles, the role of every linear layer in the blocks has to be known.
    """
    chooser, blocks = _parse(placement), find_blocks(model)
    if not blocks.projections:
        raise InputError(f"placement {shown(placement)} knows no block of a {type(model).__name__}; {WAY_OUT}")
    if missed := list(filter(chooser.misses, blocks.others)):
        raise InputError(
            f"placement {shown(placement)} does not know the roles of {_kinds(missed)} in the blocks; {WAY_OUT}"
        )
    if missed := [mixture.name for mixture in blocks.mixtures if chooser.covers(mixture)]:
        raise InputError(
            f"placement {shown(placement)} covers mixtures of experts, which are no linear layers of the block: "
            f'{_kinds(missed)}; placement="attention" leaves them out'
        )
    roles = frozenset[str]().union(*(projection.roles for projection in blocks.projections))
    if missing := chooser.needs - roles:
        raise InputError(
            f"placement {placement!r} needs {_listed(missing)}, which this model has not; it has {_listed(roles)}"
        )
    chosen = [projection for projection in blocks.projections if chooser.covers(projection)]
    if not chosen and not isinstance(chooser, Named):
        raise InputError(f"placement {placement!r} covers no linear layer of this model, which has {_listed(roles)}")
    if not chosen:
        error = unknown("placement", placement, PLACEMENTS)
        raise InputError(f"{error}; as a regular expression it matches none of {len(blocks.projections)} projections")
    return _pattern(chosen)


def describe(name: str) -> AdaptedModule:
    """The kind and the block index of a module, from its name; "other" and no index for a name not in FAMILIES."""
    for projection in find_projections([name]):
        return AdaptedModule(name, projection.kind, projection.layer)
    return AdaptedModule(name, "other", None)


def _parse(placement: str) -> Placement:
    name, colon, argument = placement.partition(":")
    if name in PLACEMENTS:
        try:
            make: Callable[..., Placement] = PLACEMENTS[name]
            return make(argument) if colon else make()
        except TypeError as error:
            raise InputError(f"placement {name!r} takes no argument, got {shown(placement)}") from error
    what = f"placement {shown(placement)} is neither a name nor a regular expression"
    with refusing(what, re.error, OverflowError, RecursionError):
        return Named(placement)


def _pattern(chosen: Sequence[Projection]) -> str:
    """The regular expression of the chosen names; paths that are chosen in the same blocks share one alternative."""
    layers = grouped(((projection.stack, projection.path), str(projection.layer)) for projection in chosen)
    paths = grouped(((stack, "|".join(blocks)), re.escape(path)) for (stack, path), blocks in layers.items())
    return "|".join(rf"{re.escape(stack)}\.(?:{blocks})\.(?:{'|'.join(p)})" for (stack, blocks), p in paths.items())


def _kinds(names: Iterable[str]) -> str:
    """The first few names, with a star for the indices of blocks."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    more = f" and {len(kinds) - MAX_LISTED} more" if len(kinds) > MAX_LISTED else ""
    return ", ".join(kinds[:MAX_LISTED]) + more


def _listed(roles: frozenset[str]) -> str:
    return ", ".join(sorted(roles, key=ROLES.index))
