"""The entry of φ(BA) in peft's table of methods.

peft's public hook, `register_peft_method`, wants a member of the enum `PeftType` and offers no way to add one, so one
is added here, by the protocol of Python's enum module. The member carries this package's name, so that a process which
loads an adapter without importing basisadapt sees `KeyError: 'BASISADAPT_PHI'`. Guarded by tests/adapter/test_peft.py.
"""

from __future__ import annotations

from peft import PeftType

PREFIX = "phi_"


def _extend(name: str) -> PeftType:
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


PHI = _extend("BASISADAPT_PHI")
