"""Importing vitfast is cheap, silent and changes nothing for its host."""

from __future__ import annotations

import os

import pytest

GLOBALS = """
import locale, logging, os, random, sys, warnings
import numpy as np
import torch

def globals_of_the_process():
    tiny = torch.tensor([1e-40])
    return {
        "denormals": (tiny * 0.5).item(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "grad": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "mkldnn": torch.backends.mkldnn.enabled,
        "sdp": torch.backends.cuda.flash_sdp_enabled(),
        "torch rng": torch.get_rng_state().sum().item(),
        "python rng": hash(random.getstate()),
        "numpy errors": np.geterr(),
        "root handlers": list(logging.root.handlers),
        "root level": logging.root.level,
        "warnings": len(warnings.filters),
        "environ": dict(os.environ),
        "path": list(sys.path),
        "locale": locale.setlocale(locale.LC_ALL),
    }
"""


def test_import_loads_nothing_heavy_and_prints_nothing(python):
    result = python(
        "-c",
        "import sys, vitfast; print(sorted({'torch', 'timm', 'numpy', 'triton', 'rich'} "
        "& set(sys.modules)))",
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_import_of_ops_touches_no_gpu_and_no_timm(python):
    result = python(
        "-c",
        "import sys, torch, vitfast.ops; "
        "print(torch.cuda.is_initialized(), 'timm' in sys.modules, 'xformers' in sys.modules)",
    )
    assert (result.stdout, result.stderr) == ("False False False\n", "")


@pytest.mark.parametrize("module", ["vitfast.ops", "vitfast.swap"])
def test_import_changes_no_global(python, module):
    # timm is imported first: what it changes is not vitfast's doing.
    code = f"""{GLOBALS}
import timm
before = globals_of_the_process()
import importlib
importlib.import_module({module!r})
after = globals_of_the_process()
print([name for name in before if before[name] != after[name]])
"""
    assert python("-c", code).stdout == "[]\n"


def test_the_probe_of_globals_sees_changes(python):
    code = f"""{GLOBALS}
before = globals_of_the_process()
torch.set_flush_denormal(True)
torch.set_num_threads(torch.get_num_threads() + 1)
logging.basicConfig()
after = globals_of_the_process()
print([name for name in before if before[name] != after[name]])
"""
    assert python("-c", code).stdout == "['denormals', 'threads', 'root handlers']\n"


def test_a_native_call_starts_no_thread_for_one_thread(python):
    code = """
import os, torch, vitfast
torch.set_num_threads(1)
vitfast.ops.layer_norm(torch.randn(64, 256))
print(len(os.listdir("/proc/self/task")))
"""
    baseline = code.replace("vitfast.ops.layer_norm(torch.randn(64, 256))", "vitfast.ops")
    assert python("-c", code).stdout == python("-c", baseline).stdout


def test_swap_stays_a_function_after_its_module_is_imported(python):
    code = "from vitfast.swap import SwapReport; import vitfast; print(callable(vitfast.swap))"
    assert python("-c", code).stdout == "True\n"


def test_public_names_exist(python):
    code = "import vitfast; print([n for n in vitfast.__all__ if not hasattr(vitfast, n)])"
    assert python("-c", code).stdout == "[]\n"


IMPORTS = {
    "package": "import vitfast",
    "module": "import vitfast.settings",
    "object_first": "import vitfast; vitfast.settings; import vitfast.settings",
    "from_module": "from vitfast.settings import settings; import vitfast",
    "from_package": "from vitfast import settings; import vitfast; vitfast.settings",
    "ops_first": "import vitfast.ops, vitfast",
    "ops_after": "import vitfast; vitfast.settings; vitfast.ops",
    "swap_first": "import vitfast; vitfast.swap",
    "swap_module": "import vitfast.swap; vitfast.layers",
}


SETTINGS = """
vitfast.settings.backend = "reference"
import vitfast.settings
from vitfast import settings as public
from vitfast.settings import settings as one
import vitfast.runtime.dispatch as dispatch
print(one.backend, public.backend, vitfast.settings.backend, dispatch.settings is one)
public.backend = "cpu"
print(one.backend, vitfast.settings.backend, one.source["backend"])
one.disable = True
print(public.disable, vitfast.settings.disable, vitfast.settings.source["disable"])
print(callable(vitfast.swap), callable(vitfast.restore), vitfast.ops.__name__)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="imports torch once, and forks")
def test_settings_reach_the_one_object_whatever_was_imported_first(python):
    code = f"""
import os, sys
import timm, torch  # what takes seconds
assert "vitfast" not in sys.modules
for name, imports in {IMPORTS!r}.items():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        print(name)
        exec(imports + {SETTINGS!r})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    lines = python("-c", code).stdout.splitlines()
    found = {lines[i]: lines[i + 1 : i + 5] for i in range(0, len(lines), 5)}
    assert found == {
        name: [
            "reference reference reference True",
            "cpu cpu python",
            "True True python",
            "True True vitfast.ops",
        ]
        for name in IMPORTS
    }
