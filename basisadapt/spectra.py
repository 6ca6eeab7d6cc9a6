"""Where a nonlinearity helps, by the update between two checkpoints: `python -m basisadapt.spectra BASE TUNED`.

A third one, with a trained adapter merged into it, tells how much of that update the adapter found.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from basisadapt.core.command import DONE, INTERRUPTED, Parser, aligned, guarded, say, tell
from basisadapt.core.errors import InputError, refusing, require, shown

if TYPE_CHECKING:
    from torch import Tensor

    from basisadapt.backbones.checkpoint import Checkpoint
    from basisadapt.phi.settings import PhiSettings

HEAD = (
    "module",
    "shape",
    "norm",
    "stable rank",
    "exponent",
    "BA",
    "sine",
    "phi",
    "adapted",
    "best as BA of",
    "verdict",
)
ALIKE = 1e-4  # shares of an update that differ by less count as equal: a fit is no more precise
GOLDEN = (math.sqrt(5) - 1) / 2  # the fractional parts of its multiples are spread most evenly
LISTED = 32  # ranks whose shares the JSON document has
ROUNDING_SHARE = 0.01  # the share of rounding in an update above which the verdict mentions it


@dataclass(frozen=True)
class Update:
    """ΔW of one module.

    module: its name in the base model.
    shape: (rows, columns).
    norm: ‖ΔW‖, Frobenius.
    stable_rank, exponent: see `diagnostics.spectrum`.
    captured: the shares of ‖ΔW‖² that the best BA of rank 1, 2, ... captures.
    rounding: the expected share of ‖ΔW‖² from rounding the tuned weight to its dtype.
    phi, sine: the shares that a fitted BA + φ(BA) and BA + sine capture; None if not fitted.
    adapted: the share that the best multiple of an adapter's update captures, see `aligned_energy`; None without one.
    """

    module: str
    shape: tuple[int, int]
    norm: float
    stable_rank: float
    exponent: float
    captured: tuple[float, ...]
    rounding: float
    phi: float | None
    sine: float | None
    adapted: float | None = None

    @property
    def energy(self) -> float:
        """‖ΔW‖²."""
        return self.norm**2

    @property
    def best(self) -> float | None:
        """The greater of `phi` and `sine`."""
        return None if self.phi is None or self.sine is None else max(self.phi, self.sine)


def rank_of(captured: Sequence[float], share: float) -> int:
    """The least rank at which BA captures `share`. captured: see `Update`."""
    return 1 + sum(one < share - ALIKE for one in captured)


def aligned_energy(update: Tensor, other: Tensor) -> float:
    """The share of ‖T‖² that the best multiple of D captures, ⟨T, D⟩² / (‖T‖² ‖D‖²); 0 where T or D is 0.

    update, other: T and D, of one shape. It says whether D has T's direction, whatever its size.
    """
    T, D = update.double().flatten(), other.double().flatten()
    energies = (T @ T).item() * (D @ D).item()
    return (T @ D).item() ** 2 / energies if energies else 0.0


def formulations(rank: int) -> tuple[PhiSettings, PhiSettings]:
    """The fitted formulations: φ(BA) of 64 sincs at Nyquist bandwidth, and the control a sin(ω BA / rms(BA)), ω = 30.

    Both are added to BA and start at amplitude 0. Of the sine, only the amplitude a is learned.
    """
    from basisadapt.phi.settings import PhiSettings

    phi = PhiSettings(r=rank, num_basis=64, omega_init="nyquist", gain="normalised:1")
    sine = PhiSettings(r=rank, basis="sinusoid", num_basis=1, omega_init=30.0, learn_omega=False, gain="normalised:1")
    return phi, sine


@guarded
def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        names = options.base, options.tuned
        updates = updates_between(*names, options.rank, options.modules, options.fit, options.adapted)
        say(json.dumps(document(updates, options.rank), indent=1) if options.json else report(updates, options.rank))
    except KeyboardInterrupt:
        tell("\nInterrupted.")
        return INTERRUPTED
    return DONE


def _parser() -> Parser:
    parser = Parser(
        prog="python -m basisadapt.spectra",
        description="Examine the update that full fine-tuning made, matrix by matrix: its size, the decay of its "
        "singular values, and how much of it BA and phi(BA) of one rank capture. The verdict says whether phi helps. "
        "Only safetensors are read.",
    )
    parser.add_argument("base", metavar="BASE", help="the pretrained model: a folder, a hub id or a backbone's name")
    parser.add_argument("tuned", metavar="TUNED", help="the same model, fine-tuned")
    parser.add_argument(
        "--adapted",
        metavar="MODEL",
        help="the same model with a trained adapter merged into it: how much of the update has the adapter found?",
    )
    parser.add_argument("--rank", type=int, default=4, metavar="R", help="the rank of BA and phi(BA) (default: 4)")
    parser.add_argument(
        "--modules",
        metavar="REGEX",
        help="the modules to examine, by their full names in BASE (default: all projections of the blocks)",
    )
    parser.add_argument(
        "--fit",
        type=int,
        default=12,
        metavar="K",
        help="fit phi and the sine to K of them, evenly spread (default: 12); a matrix of 384 x 384 takes about ten "
        "seconds of one core, and the time grows with the number of entries",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else on stdout")
    return parser


def updates_between(
    base_name: str, tuned_name: str, rank: int, pattern: str | None, fits: int, adapted_name: str | None = None
) -> list[Update]:
    """The updates of modules, in the order of the base's names.

    base_name, tuned_name: a folder, a hub id or a backbone's name.
    rank: the rank of BA and φ(BA), at least 1 and below every side of the matrices.
    pattern: a regular expression for the modules. None takes the projections of the blocks.
    fits: the number of modules, evenly spread, that φ and the sine are fitted to, at least 1.
    adapted_name: as the others, a model with a trained adapter merged into it. Default None, there is none.

    Raises InputError for bad numbers, for missing checkpoints, and for checkpoints of different models.
    """
    import torch

    from basisadapt import backbones
    from basisadapt.backbones.checkpoint import Checkpoint

    if rank < 1 or fits < 1:
        raise InputError(f"--rank and --fit must be at least 1, got {rank} and {fits}")
    base, tuned = (Checkpoint(backbones.find(name)) for name in (base_name, tuned_name))
    pairs = pairs_of(base, tuned, pattern)
    adapted = None if adapted_name is None else Checkpoint(backbones.find(adapted_name))
    of_adapted = {} if adapted is None else dict(pairs_of(base, adapted, pattern))
    for module, _ in pairs:
        smaller = min(base.shapes[module])
        require(rank < smaller, "--rank", rank, f"below {smaller}, the smaller side of {module!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    places = spread_places(len(pairs), fits)
    updates = []
    for place, (module, other) in enumerate(pairs):
        tell(f"[{place + 1}/{len(pairs)}] {module}")
        matrices = base.read(module).to(device), tuned.read(other).to(device)
        third = None if adapted is None else adapted.read(of_adapted[module]).to(device)
        updates.append(_update(module, *matrices, third, rank, place in places))
    if not any(update.energy for update in updates):
        raise InputError(f"{base_name!r} and {tuned_name!r} do not differ in any of {len(updates)} matrices")
    if adapted is not None and not any(update.adapted for update in updates):
        raise InputError(f"{adapted_name!r} has nothing of that update in any of {len(updates)} matrices")
    return updates


def spread_places(count: int, fits: int) -> set[int]:
    """`fits` of `count` positions, or all if there are fewer: one in each of `fits` equal intervals.

    The position in interval n is the fractional part of n times the golden ratio, so that identical blocks do not
    always contribute the same matrix.
    """
    fits = min(fits, count)
    ends = [number * count // fits for number in range(fits + 1)]
    stretches = enumerate(itertools.pairwise(ends))
    return {start + int(number * GOLDEN % 1 * (end - start)) for number, (start, end) in stretches}


def pairs_of(base: Checkpoint, tuned: Checkpoint, pattern: str | None) -> list[tuple[str, str]]:
    """The names of the modules in both checkpoints, see `updates_between`.

    Raises InputError if there are none, or their shapes differ.
    """
    others, pairs = _names_in(tuned, base), []
    for name in _chosen(base, pattern):
        other = others.get(name)
        if other is None:
            raise InputError(f"{tuned.name!r} has no {name!r}, as {base.name!r} does: it is another model")
        if base.shapes[name] != tuned.shapes[other]:
            sides = [" x ".join(map(str, shape)) for shape in (base.shapes[name], tuned.shapes[other])]
            raise InputError(f"{name!r} is {sides[0]} in {base.name!r} and {sides[1]} in {tuned.name!r}: another model")
        pairs.append((name, other))
    return pairs


def _chosen(base: Checkpoint, pattern: str | None) -> list[str]:
    from basisadapt.adapter.placement import find_projections

    if pattern is None:
        names = [projection.name for projection in find_projections(base.shapes)]
    else:
        with refusing(f"--modules {shown(pattern)} is not a regular expression", re.error):
            names = list(filter(re.compile(pattern).fullmatch, base.shapes))
    if not names:
        known = f"it has {', '.join(list(base.shapes)[:3])}, ..." if base.shapes else "it has no matrices"
        raise InputError(f"no module of {base.name!r} is chosen; --modules names some: {known}")
    return names


def _names_in(other: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """The base's names of modules to the other's; in a model with a head, they may have one more prefix."""
    longer = {name.partition(".")[2]: name for name in base.shapes}
    names = {}
    for name in other.shapes:
        shorter = name.partition(".")[2]
        known = name if name in base.shapes else shorter if shorter in base.shapes else longer.get(name)
        if known is not None:
            names[known] = name
    return names


def _update(module: str, base: Tensor, tuned: Tensor, adapted: Tensor | None, rank: int, fit: bool) -> Update:
    from basisadapt.adapter.fit import fitted_energy
    from basisadapt.diagnostics.spectrum import captured, power_exponent, singular_values, stable_rank

    change = tuned.double() - base.double()
    other = None if adapted is None else adapted.double() - base.double()
    if not all(one.isfinite().all() for one in (change, other) if one is not None):
        raise InputError(f"{module!r} has weights that are not finite")
    sigma = singular_values(change)
    energy = change.square().sum().item()
    phi, sine = (fitted_energy(change, one) for one in formulations(rank)) if fit else (None, None)
    return Update(
        module=module,
        shape=(change.shape[0], change.shape[1]),
        norm=math.sqrt(energy),
        stable_rank=stable_rank(sigma),
        exponent=power_exponent(sigma),
        captured=tuple(captured(sigma).tolist()),
        rounding=min(1.0, _rounding(tuned) / energy) if energy else 0.0,
        phi=phi,
        sine=sine,
        adapted=None if other is None else aligned_energy(change, other),
    )


def _rounding(weight: Tensor) -> float:
    """The expected squared error of rounding to the weight's dtype, Σ spacing² / 12 over its entries."""
    import torch

    _, exponent = torch.frexp(weight.double())
    spacing = torch.ldexp(torch.full_like(weight, torch.finfo(weight.dtype).eps, dtype=torch.float64), exponent - 1)
    return spacing.where(weight != 0, 0.0).square().sum().item() / 12


# --- the answer ---


def report(updates: Sequence[Update], rank: int) -> str:
    """The table with the verdict below it."""
    fitted = [update for update in updates if update.phi is not None]
    rows = [HEAD, *(_row(update, rank) for update in updates)]
    if len(fitted) > 1:
        rows.append(_row(_together(fitted), rank))
    kept = [n for n, head in enumerate(HEAD) if head != "adapted" or updates[0].adapted is not None]
    shown = [tuple(row[n] for n in kept) for row in rows]
    return "\n".join([*aligned(shown, left=range(len(kept))), "", *_verdict(fitted, rank, len(updates))])


def document(updates: Sequence[Update], rank: int) -> dict[str, Any]:
    """The report in JSON types: the `Update` of every module, with the shares of up to `LISTED` ranks, and the verdict.

    An undefined exponent is None.
    """
    fitted = [update for update in updates if update.phi is not None]
    modules = [
        {
            **asdict(update),
            "captured": update.captured[:LISTED],
            "exponent": None if math.isnan(update.exponent) else update.exponent,
        }
        for update in updates
    ]
    return {"rank": rank, "modules": modules, "verdict": _verdict(fitted, rank, len(updates))}


def _together(updates: Sequence[Update]) -> Update:
    """The mean of several updates, weighted by energy; NaN for what has no mean."""
    energy = math.fsum(update.energy for update in updates)

    def mean(shares: Iterator[float]) -> float:
        return math.fsum(u.energy * share for u, share in zip(updates, shares, strict=True)) / energy if energy else 0.0

    ranks = range(max(len(update.captured) for update in updates))
    return Update(
        module=f"the {len(updates)} that were fitted, by energy",
        shape=(0, 0),
        norm=math.sqrt(energy),
        stable_rank=math.nan,
        exponent=math.nan,
        captured=tuple(mean(u.captured[min(k, len(u.captured) - 1)] for u in updates) for k in ranks),
        rounding=mean(u.rounding for u in updates),
        phi=mean(u.phi or 0.0 for u in updates),
        sine=mean(u.sine or 0.0 for u in updates),
        adapted=None if any(u.adapted is None for u in updates) else mean(u.adapted or 0.0 for u in updates),
    )


def _row(update: Update, rank: int) -> tuple[str, ...]:
    shape = " x ".join(map(str, update.shape)) if any(update.shape) else ""
    told = ["" if math.isnan(x) else f"{x:.2f}" for x in (update.stable_rank, update.exponent)]
    shares = [update.captured[rank - 1], update.sine, update.phi, update.adapted]
    percent = ["" if share is None else f"{100 * share:.1f} %" for share in shares]
    rest = ("", "") if update.best is None else (f"rank {rank_of(update.captured, update.best)}", _word(update, rank))
    return (update.module, shape, f"{update.norm:.3g}", *told, *percent, *rest)


def _helps(update: Update, rank: int) -> bool:
    """Whether φ or the sine captures more than BA of the next rank, which has more parameters than they add."""
    return rank_of(update.captured, update.best or 0.0) > rank + 1


def _word(update: Update, rank: int) -> str:
    return "phi helps" if _helps(update, rank) else "phi does not help"


def _verdict(fitted: Sequence[Update], rank: int, count: int) -> list[str]:
    whole = _together(fitted)
    assert whole.phi is not None and whole.sine is not None and whole.best is not None
    phi, sine, ba = (f"{100 * share:.1f} %" for share in (whole.phi, whole.sine, whole.captured[rank - 1]))
    said = [
        f"Here {_word(whole, rank)}: of the update BA of rank {rank} captures {ba}, phi(BA) of that rank {phi} and a "
        f"fixed sine {sine}; the best is as BA of rank {rank_of(whole.captured, whole.best)}.",
        f"It helps where it captures more than BA of rank {rank + 1}: in {sum(_helps(u, rank) for u in fitted)} of the "
        f"{len(fitted)} matrices that were fitted, of {count}.",
    ]
    if _helps(whole, rank):
        said.append(
            "Learning the function pays."
            if rank_of(whole.captured, whole.phi) > rank_of(whole.captured, whole.sine)
            else "A fixed sine is enough."
        )
    if whole.adapted is not None:
        said.append(
            f"Of those matrices the best multiple of the adapted model's update captures {100 * whole.adapted:.1f} %, "
            f"where phi(BA) of rank {rank} could capture {phi}."
        )
    if whole.rounding > ROUNDING_SHARE:
        said.append(
            f"Some {100 * whole.rounding:.0f} % of this update is the rounding of the tuned weights, whose spectrum is "
            "flat and which nobody wants to learn: compare checkpoints in float32."
        )
    return said


if __name__ == "__main__":
    sys.exit(main())
