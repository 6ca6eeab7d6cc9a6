"""Registers this package's methods with peft.

peft's public hook, `register_peft_method`, wants a member of the enum `PeftType` and offers no way to add one, so it is
added here, by the protocol of Python's enum module. A member carries this package's name, so that a process which
loads an adapter without importing basisadapt sees `KeyError: 'BASISADAPT_PHI'`. Guarded by tests/adapter/test_peft.py.
"""

from __future__ import annotations

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def peft_type(method: str) -> PeftType:
    """The member `BASISADAPT_<METHOD>` of peft's enum; the first call adds it."""
    name = f"BASISADAPT_{method.upper()}"
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def register(method: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Register a method with peft, once per process. method: its name, in lower case."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if (member := peft_type(method)) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=member.value.lower(), config_cls=config, model_cls=model, prefix=model.prefix)
