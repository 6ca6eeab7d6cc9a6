"""A process knows our methods after `import basisadapt`, in whatever order it looks for peft, imports it and us."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import peft
import pytest

import basisadapt
from basisadapt.core.errors import InputError
from basisadapt.core.registry import load_plugin

STEPS = {
    "ours": "import basisadapt",
    "probe": "assert importlib.util.find_spec('peft').name == 'peft'",
    "import": "import peft",
    "class": "from peft import PeftModel",
    "submodule": "import peft.tuners",
    "broken": "fail_once()",
}
# Every order of our import, a mere look and peft's import, then other ways to look and to import around ours.
ORDERS = [
    *itertools.permutations(("ours", "probe", "import")),
    *itertools.permutations(("ours", "probe", "submodule")),
    ("ours", "probe", "probe", "class"),
    ("ours", "broken", "import"),
    ("probe", "ours", "broken", "probe", "broken", "class"),
    ("ours", "ours", "import", "ours"),
]
EVERY_ORDER = """
import importlib.util, os, sys, traceback

def fail_once():
    os.environ["PEFT_BREAKS"] = "1"
    try:
        import peft
    except ImportError:
        del os.environ["PEFT_BREAKS"]
    else:
        raise AssertionError("peft was imported")

wrong = []
for order in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            from basisadapt.core import peft_hook
            sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, peft_hook._PeftFinder)]
            del sys.modules["basisadapt"]
            peft_hook.METHODS = ("stand_in_method",)
            exec(order)
            assert "stand_in_method" in sys.modules
            assert not [f for f in sys.meta_path if isinstance(f, peft_hook._PeftFinder)], "it stays for ever"
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        wrong.append(order)
sys.exit("\\n\\n".join(wrong) or 0)
"""
STAND_IN = {
    "peft/__init__.py": "import os\nif 'PEFT_BREAKS' in os.environ:\n    raise ImportError\nclass PeftModel: ...\n",
    "peft/tuners.py": "",
    "stand_in_method.py": "from peft import PeftModel  # which is there: peft was executed to its end\n",
}


def run(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_order_of_imports(tmp_path):
    """With a stand-in for peft, whose own import takes seconds, each time."""
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    run(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{EVERY_ORDER}", *map(in_order, ORDERS))


def in_order(steps):
    return "\n".join(STEPS[step] for step in steps)


@pytest.mark.parametrize(
    "order",
    [
        "import basisadapt; from transformers.utils import is_peft_available; assert is_peft_available()",
        "from transformers.utils import is_peft_available; assert is_peft_available(); import basisadapt",
    ],  # peft before us: `test_peft`, in the process that loads an adapter
)
def test_peft_itself_knows_all_our_methods(order):
    """transformers looks for peft, as do the libraries above it, and does not import it."""
    known = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known"
    names = "print(*sorted(kind.value for kind in known if 'BASIS' in kind))"
    ours = ("ABBA", "AURORA", "DYLORA", "ELALORA", "KRADAPTER", "NOLA", "PHI")
    assert run(f"{order}\n{known}\n{names}").split() == [f"BASISADAPT_{name}" for name in ours]


def test_where_peft_is_missing_its_import_says_so():
    program = """
import sys, basisadapt
class Hidden:
    def find_spec(self, name, *rest):
        if name == "peft":
            raise ImportError("none")
sys.meta_path.insert(1, Hidden())
try:
    import peft
except ImportError as error:
    print(error)
"""
    assert run(program) == "none\n"


def test_an_adapter_of_a_plug_in_says_which_to_import(tmp_path, bert, monkeypatch):
    """Its file's name, without the folder that it lay in; nothing where all is this package's own."""
    from basisadapt.phi.basis import BASES

    (tmp_path / "my_waves.py").write_text(
        "import torch\nfrom basisadapt import TransferBasis\n\n\n"
        "class Wave(TransferBasis, name='wave_of_a_test'):\n    def forward(self, u):\n        return torch.cos(u)\n"
    )
    monkeypatch.setattr(BASES, "_classes", {**BASES._classes})
    load_plugin(str(tmp_path / "my_waves.py"))
    config = basisadapt.PhiConfig(r=2, basis="wave_of_a_test", task_type="SEQ_CLS")
    assert config.plugins == ["my_waves.py"]
    assert basisadapt.PhiConfig(r=2).plugins is None
    peft.get_peft_model(bert, config).save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert basisadapt.PhiConfig.from_pretrained(str(tmp_path / "adapter")).plugins == ["my_waves.py"]
    del BASES._classes["wave_of_a_test"]
    with pytest.raises(InputError, match=r"unknown basis 'wave_of_a_test'.*; the adapter needs my_waves\.py: import"):
        basisadapt.PhiConfig.from_pretrained(str(tmp_path / "adapter"))


@pytest.mark.parametrize("plugins", [1, True, "waves", {"a": 1}, [1]])
def test_plugins_that_are_no_list_of_names_are_not_repeated(tmp_path, bert, plugins):
    peft.get_peft_model(bert, basisadapt.PhiConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "plugins": plugins, "r": -1}))
    with pytest.raises(InputError) as error:
        basisadapt.PhiConfig.from_pretrained(str(tmp_path))
    assert "import it first" not in str(error.value)
