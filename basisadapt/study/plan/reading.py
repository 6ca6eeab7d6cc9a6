"""Reading the file of a study, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from basisadapt.core.errors import InputError, one_line, refusing, require, shown, unknown
from basisadapt.core.settings import from_mapping
from basisadapt.study.plan.claims import COMMON, PLATEAU, Claim
from basisadapt.study.plan.published import PublishedTable
from basisadapt.study.plan.shipped import list_studies, studies_dir
from basisadapt.study.plan.spec import (
    PRESETS,
    RULE,
    SWEEP,
    TUNE,
    ExtraRow,
    Factor,
    Law,
    Lines,
    Map,
    Reference,
    StudySpec,
    Tune,
    axes_in,
    check_axes,
)
from basisadapt.study.plan.yaml_text import parse_yaml

MAX_BYTES = 1_000_000  # of a study's file


def read_spec(name: str) -> StudySpec:
    """The study called `name`, or the one in the file of that path. Raises InputError."""
    is_path = name.endswith((".yaml", ".yml"))
    if not is_path and name not in list_studies():
        raise unknown("study", name, list_studies())
    path = Path(name) if is_path else studies_dir() / f"{name}.yaml"
    values = _read_file(path, ())
    with refusing(f"study file {str(path)!r}", InputError):
        return _spec({**values, "name": path.stem})


def _read_file(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of the file that it is `like`. above: the files that led here."""
    where = f"study file {str(path)!r}"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{where} must have at most {MAX_BYTES:,} bytes")
        values: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where} cannot be read: {one_line(error)}") from error
    if not _has_names(values):
        raise InputError(f"{where} must hold keys and values")
    _check_paths(values, where)
    if "like" in values:
        other = _like(values.pop("like"), path)
        if other in (*above, path):
            raise InputError(f"{where}: like leads back to {other.name!r}")
        below = _read_file(other, (*above, path))
        values = _merged({key: below[key] for key in ("base", "presets", "seeds") if key in below}, values)
    return values


def _check_paths(values: Any, where: str) -> None:
    """Raise InputError for a path of data or of a model in `values` that leads out of the study's folder."""
    if isinstance(values, list):
        for value in values:
            _check_paths(value, where)
    for key, value in values.items() if isinstance(values, dict) else ():
        if str(key).rpartition(".")[2] not in ("task", "test", "backbone"):
            _check_paths(value, where)
            continue
        for name in value if isinstance(value, list) else [value]:
            path = PurePath(name) if isinstance(name, str) else PurePath()
            if path.is_absolute() or ".." in path.parts:
                raise InputError(f"{where}: {key} leads out of the folder; give {shown(name)} with --set")


def _like(name: Any, path: Path) -> Path:
    """The file that the file at `path` is `like`: a shipped study, or one in the same folder. Raises InputError."""
    if isinstance(name, str) and name.endswith((".yaml", ".yml")):
        return path.parent / _inside(name, f"study file {str(path)!r}: like")
    if name not in list_studies():
        raise InputError(f"study file {str(path)!r}: like: {unknown('study', name, list_studies())}")
    return studies_dir() / f"{name}.yaml"


def _inside(name: str, where: str) -> str:
    """The name of a file in the study's folder, checked. Raises InputError for a path that leads out of it."""
    inside = PurePath(name).name == name and name != ".." and "\\" not in name and "\0" not in name
    require(inside, where, name, "the name of a file in the same folder")
    return name


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    both = {key: value for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: _merged(below[key], value) for key, value in both.items()}}


def _spec(values: dict[str, Any]) -> StudySpec:
    for key in ("title", "question"):
        if key not in values:
            raise InputError(f"{key} is missing")
    if values.get("answers") is not None:
        values["answers"] = _part(PublishedTable, values["answers"], "answers")
        _inside(values["answers"].table, "answers.table")
    for key, cls in {"tune": Tune, "law": Law, "map": Map, "lines": Lines}.items():
        if values.get(key) is not None:
            values[key] = _part(cls, values[key], key)
    beside = _parts(ExtraRow, values.get("beside"), "beside")
    values["beside"] = [replace(row, set={k: Factor.parse(v) for k, v in row.set.items()}) for row in beside]
    values["claims"] = _parts(Claim, values.get("claims"), "claims")
    presets = values.get("presets")
    if isinstance(presets, dict):
        values["presets"] = {name: overrides for name, overrides in presets.items() if overrides is not None}
    if values.get("reference") is not None:
        values["reference"] = _reference(values["reference"], _axes(values))
    if isinstance(values.get("given"), dict):
        sweep = values.get("sweep")
        values["given"] = _by_axis(values["given"], sweep if isinstance(sweep, dict) else {})
    spec = from_mapping(StudySpec, values)
    check_axes(spec.sweep, SWEEP)
    for claim in spec.claims:
        _check_claim(claim, spec.tune)
    for preset, overrides in spec.presets.items():
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        if not _has_names(overrides):
            raise InputError(f"presets.{preset} must hold keys and values, got {shown(overrides)}")
        for kind in (SWEEP, TUNE):
            check_axes({name: axis for name, axis in axes_in(overrides, kind).items() if name not in RULE}, kind)
    return spec


def _has_names(values: Any) -> bool:
    """Whether a part of a file is a mapping whose keys are text, as YAML's need not be."""
    return isinstance(values, dict) and all(isinstance(key, str) for key in values)


def _axes(values: Mapping[str, Any]) -> list[str]:
    """The axes of a file's sweep and of its presets, as written there."""
    sweep, presets = values.get("sweep"), values.get("presets")
    parts = presets.values() if isinstance(presets, dict) else ()
    named = [axes_in(part, SWEEP) for part in parts if _has_names(part)]
    return [name for axes in (sweep, *named) if isinstance(axes, dict) for name in axes]


def _reference(text: Any, axes: Sequence[str]) -> Reference:
    """The reference of a text: AXIS=VALUE if the axis exists, else a label, which may contain "=" too."""
    require(isinstance(text, str), "reference", text, "text or null")
    axis, equals, value = text.partition("=")
    known = {str(name).removeprefix("adapter.") for name in axes}
    return Reference(value, axis) if equals and axis.removeprefix("adapter.") in known else Reference(text)


def _by_axis(given: Mapping[Any, Any], sweep: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """The settings that a file gives for AXIS=VALUE: axis to value to settings."""
    found: dict[str, dict[str, Any]] = {}
    for name, overrides in given.items():
        axis, _, value = str(name).partition("=")
        if axis not in sweep or not _has_names(overrides):
            raise InputError(
                f"given.{name} must be AXIS=VALUE of the sweep with keys and values, got {shown(overrides)}"
            )
        found.setdefault(axis, {})[value] = overrides
    return found


def _check_claim(claim: Claim, tune: Tune | None) -> None:
    """Raise InputError for a claim on values of the tuned setting at which the study runs no row."""
    at, common = (None, None) if tune is None else (tune.at, tune.common)
    if claim.at is not None and common is None and (at is None or claim.at == COMMON):
        missing = "tune.common" if claim.at == COMMON else "tune.at or tune.common"
        raise InputError(f"claim {claim.text!r} is on rows at {claim.at}, which needs {missing}")
    if claim.metric == PLATEAU and at is None:
        raise InputError(f"claim {claim.text!r} is on a plateau, which needs tune.at")


def _part(cls: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where} must hold keys and values, got {shown(values)}")
    return from_mapping(cls, values, where)


def _parts(cls: type[Any], values: Any, where: str) -> list[Any]:
    require(isinstance(values, list | None), where, values, "a list")
    return [_part(cls, part, f"{where}[{index}]") for index, part in enumerate(values or ())]
