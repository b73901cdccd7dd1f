"""native.NameState: whether names of classes and modules stand for what they did; and
native.unwatched: whether a call may leave timm's forward at all."""

import gc
import types
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast.engine.eligibility import is_unwatched, may_fuse
from vitfast.runtime import native
from vitfast.settings import settings

pytestmark = pytest.mark.skipif(native.extension() is None, reason="no native extension")


def _classes():
    class Base:
        def inherited(self):
            pass

    class Kind(Base):
        def own(self):
            pass

        @classmethod
        def of_class(cls):
            pass

    return Base, Kind


def _state(*places):
    return native.extension().NameState(list(places))


def _changed_by(owner, name):
    found = vars(owner)[name]
    setattr(owner, name, lambda self: None)
    yield
    setattr(owner, name, found)
    yield


@pytest.mark.parametrize("name", ["inherited", "own", "of_class"])
def test_a_replaced_attribute_of_a_class_shows_until_it_is_put_back(name):
    base, kind = _classes()
    state = _state((kind, ["inherited", "own", "of_class"]))
    for _ in range(3):
        assert state.same()
    changing = _changed_by(base if name == "inherited" else kind, name)
    next(changing)
    assert not state.same()
    next(changing)
    assert state.same()
    next(_changed_by(base if name == "inherited" else kind, name))
    assert not state.same()


def test_what_is_added_to_a_class_hides_what_its_base_has():
    _, kind = _classes()
    state = _state((kind, ["inherited"]))
    kind.other = 1
    assert state.same()
    kind.inherited = lambda self: None
    assert not state.same()
    del kind.inherited
    assert state.same()


def test_a_metaclass_is_asked_every_time():
    class Meta(type):
        @property
        def named(cls):
            return cls.values[0]

    class Kind(metaclass=Meta):
        values = [1]

    state = _state((Kind, ["named"]))
    assert state.same()
    Kind.values[0] = 2
    assert not state.same()


def test_names_of_a_module_show_wherever_its_dictionary_moves_them():
    module = types.ModuleType("module")
    module.a, module.b = object(), object()
    state = _state((module, ["a", "b"]))
    assert state.same()
    kept = module.a
    del module.a
    assert not state.same()
    module.a = kept
    for i in range(200):
        setattr(module, f"other_{i}", i)
        assert state.same()
    module.b = object()
    assert not state.same()


def test_names_that_a_module_makes_up():
    module = types.ModuleType("module")
    module.__getattr__ = lambda name: [name]
    state = _state((module, ["a"]))
    assert state.same()
    module.a = 1
    assert not state.same()


def test_a_cycle_through_a_class_is_collected():
    _, kind = _classes()
    kind.state = _state((kind, ["own"]))
    dead = weakref.ref(kind)
    del kind
    gc.collect()
    assert dead() is None


def test_what_is_no_attribute_raises():
    with pytest.raises(AttributeError):
        _state((types.ModuleType("module"), ["a"]))


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _hook(name):
    def register():
        return getattr(nn_module, f"register_module_{name}")(lambda *args: None)

    return register


class _Handle:
    """A context manager as the handle of a hook."""

    def __init__(self, context):
        self.context = context
        context.__enter__()

    def remove(self):
        self.context.__exit__(None, None, None)


WATCHED = {
    "forward hook": _hook("forward_hook"),
    "forward pre-hook": _hook("forward_pre_hook"),
    "backward hook": _hook("full_backward_hook"),
    "backward pre-hook": _hook("full_backward_pre_hook"),
    "dispatch mode": lambda: _Handle(_Mode()),
    "function mode": lambda: _Handle(DeviceContext(torch.device("cpu"))),
    "dual level": lambda: _Handle(forward_ad.dual_level()),
}


@pytest.mark.parametrize("kind", WATCHED)
def test_whoever_watches(kind):
    x = torch.randn(2, 3)
    assert is_unwatched(x, None, x)
    handle = WATCHED[kind]()
    try:
        assert not is_unwatched(x)
    finally:
        handle.remove()
    assert is_unwatched(x)


def test_transforms_and_traces_watch(monkeypatch):
    def asked(x):
        seen.append(is_unwatched(torch.ones(2)))
        return x * 1

    seen = []
    torch.func.vmap(asked)(torch.ones(2))
    torch.jit.trace(asked, torch.ones(2), check_trace=False)
    assert seen == [False, False]
    monkeypatch.setattr(settings, "disable", True)
    assert not is_unwatched(torch.ones(2))


def test_hooks_in_a_dictionary_of_another():
    """Whoever replaces the dictionary itself is asked about, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn_module, "_global_forward_hooks", {})
        assert not is_unwatched(torch.ones(2))
    assert is_unwatched(torch.ones(2))


NUMBERS = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
MAYBE = {
    "uint16": lambda: torch.zeros(2, dtype=torch.uint16),
    "float8": lambda: torch.zeros(2, dtype=torch.float8_e4m3fn),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "meta": lambda: torch.zeros(2, device="meta"),
    "negated": lambda: torch._neg_view(torch.ones(2)),
    "imaginary part": lambda: torch.zeros(2, dtype=torch.complex64).conj().imag,
    "zero tensor": lambda: torch._efficientzerotensor(2),
    "sparse": lambda: torch.ones(2, 2).to_sparse(),
    "oneDNN's": lambda: torch.ones(2, 2).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "subclass": lambda: torch.ones(2).as_subclass(type("Own", (torch.Tensor,), {})),
    "no tensor": lambda: [1.0],
}


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_plain_inputs(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    assert is_unwatched(x, x.t(), x[1:], torch.nn.Parameter(x, requires_grad=False))


@pytest.mark.parametrize("kind", MAYBE)
def test_other_inputs(kind):
    """Where may_fuse asks further, and what it says then."""
    x = MAYBE[kind]()
    assert not is_unwatched(x)
    assert not is_unwatched(torch.ones(2), x)
    assert may_fuse(x) == (kind == "meta")
