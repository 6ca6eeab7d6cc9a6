"""PhiConfig: the settings of φ(BA) as a peft configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from basisadapt.adapter.peft_type import peft_type
from basisadapt.adapter.saved import CheckedConfig, Shape
from basisadapt.core.registry import plugin_of
from basisadapt.phi.basis import BASES
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.settings import PhiSettings
from basisadapt.phi.sharing import SHARING


@dataclass(kw_only=True)
class PhiConfig(PhiSettings, CheckedConfig):
    """The configuration of a φ(BA) adapter for `peft.get_peft_model`; the formula and its settings: `PhiSettings`.

    `target_modules` left out is filled from `placement` when the adapter is put into a model. exclude_modules,
    modules_to_save: as everywhere in peft; a classification head goes into modules_to_save by itself if task_type is
    given. Dropout acts on the adapter's input while training; merging takes the evaluation form, without dropout, so
    a merged model equals the adapter in evaluation mode, not the average over dropout masks (f is not linear).
    plugins: the files, without their folders, and modules that basis, grid and sharing come from; it is filled in.

    Example: PhiConfig(preset="residual", r=4, basis="sinc", target_modules=["query", "value"]).
    """

    plugins: list[str] | None = None

    def __post_init__(self) -> None:
        CheckedConfig.__post_init__(self)
        PhiSettings.__post_init__(self)
        used = (BASES[self.basis], GRIDS[self.grid], SHARING[self.sharing])
        self.plugins = sorted({name for name in map(plugin_of, used) if name is not None}) or None
        self.peft_type = peft_type("phi")

    def saved_shapes(self) -> Mapping[str, Shape]:
        """A, B and the bank's tables."""
        names = ("phi_bank.alpha", "phi_bank.raw_omega", "phi_bank.grid")
        tables: dict[str, Shape] = dict.fromkeys(names, (None, self.num_basis))
        if self.gain_form.kind == "learned":
            tables["phi_bank.log_gain"] = (None,)
        return {"phi_A": (self.r, None), "phi_B": (None, self.r), **tables}
