"""Fine-tuning methods, one file each. Importing this package registers them here and with peft."""

from __future__ import annotations

from basisadapt.methods import abba as abba
from basisadapt.methods import adalora as adalora
from basisadapt.methods import aurora as aurora
from basisadapt.methods import dora as dora
from basisadapt.methods import dylora as dylora
from basisadapt.methods import elalora as elalora
from basisadapt.methods import hira as hira
from basisadapt.methods import kradapter as kradapter
from basisadapt.methods import lora as lora
from basisadapt.methods import nola as nola
from basisadapt.methods import phi as phi
from basisadapt.methods import pissa as pissa
from basisadapt.methods import plain as plain
from basisadapt.methods import randlora as randlora
from basisadapt.methods import rslora as rslora
from basisadapt.methods import sinelora as sinelora
from basisadapt.methods import vera as vera
from basisadapt.methods.method import METHODS, Description, Method, ParameterGroup, PeftMethod

__all__ = ["METHODS", "Description", "Method", "ParameterGroup", "PeftMethod"]
