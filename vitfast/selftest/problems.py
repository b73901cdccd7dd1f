"""Problems: calls of ops as data, recorded from a model or taken from an op's samples.

A problem holds no values, only what a kernel is compiled and launched by: shapes, strides, dtypes
and options. Its values are drawn anew, the same in every process, by what an argument means.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitfast.ops import spec_of
from vitfast.ops.spec import Arguments, OpSpec, Sample, randn
from vitfast.runtime import library, trust

_ABSENT = {"qk_norm": "", "gate": ""}
"""Public argument -> what the registered op has for None."""


@dataclass(frozen=True)
class Described:
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, t: torch.Tensor) -> Described:
        return cls(tuple(t.shape), tuple(t.stride()), str(t.dtype).removeprefix("torch."))

    @property
    def span(self) -> int:
        """Elements from the first in memory to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class Problem:
    """One call of an op.

    Args:
        op: a name of `vitfast.ops`.
        dtype: that of the first tensor, such as "bfloat16"; the working dtype.
        arguments: by the names of the public function's parameters; tensors as `Described`, dtypes
            by name. Empty for a sample.
        autocast: the dtype of autocast where it was on, else "".
        sample: name of one of the spec's samples, in place of arguments.
    """

    op: str
    dtype: str
    arguments: Mapping[str, Any]
    autocast: str = ""
    sample: str = ""

    @property
    def name(self) -> str:
        """The sample's name; of a recorded call a hash that is the same in every process."""
        if self.sample:
            return self.sample
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def bytes(self) -> float:
        """Of all tensors of a recorded call."""
        found = _tensors(self.arguments)
        return float(sum(d.span * getattr(torch, d.dtype).itemsize for d in found))

    def to_json(self) -> dict[str, Any]:
        """As values that JSON knows; `from_json` gives the problem back."""
        return {
            "op": self.op, "dtype": self.dtype, "arguments": _encoded(dict(self.arguments)),
            "autocast": self.autocast, "sample": self.sample,
        }  # fmt: skip

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Problem:
        return cls(**{**found, "arguments": _decoded(found["arguments"])})

    def as_sample(self) -> Sample:
        """The problem as a sample of its op's spec, of which any generic code makes a case."""
        if self.sample:
            return next(s for s in spec_of(self.op).samples if s.name == self.sample)
        return Sample(self.name, lambda dtype, generator: _arguments(self, generator))


def most_flops(device: torch.device) -> float:
    """Of a sample that a self-test runs on a device: a second or two in Triton's interpreter."""
    return math.inf if device.type == "cuda" else 5e4


def samples(spec: OpSpec, dtype: str, most: float = math.inf) -> list[Problem]:
    """An op's samples that reach every branch of its kernels at small sizes (`vitfast check`'s).

    Args:
        most: operations above which one is left out, as of `most_flops`.
    """
    found = [s for s in spec.samples if "check" in s.tags or "small" in s.tags]
    if most < math.inf:
        found = [s for s in found if not s.tags & {"real", "large"}]
        calls = [s.make(torch.float32, torch.Generator()) for s in found]
        found = [s for s, c in zip(found, calls, strict=True) if spec.cost(*c).flops < most]
    return [Problem(spec.name, dtype, {}, sample=s.name) for s in found]


@contextlib.contextmanager
def recording() -> Iterator[list[Problem]]:
    """Gives the calls of ops with kernels to test that are made within, by any thread, each
    different one once."""
    found: dict[str, Problem] = {}
    problems: list[Problem] = []

    def note(op: str, arguments: Mapping[str, Any]) -> None:
        if op in trust.WITHOUT_OURS:
            return
        problem = problem_of(op, arguments)
        if found.setdefault(problem.name, problem) is problem:
            problems.append(problem)

    with library.watching(note):
        yield problems


def problem_of(op: str, arguments: Mapping[str, Any]) -> Problem:
    """The problem that a call of a registered op poses.

    Args:
        arguments: of `torch.ops.vitfast.<op>`, by the names in its schema.
    """
    public = inspect.signature(spec_of(op).public).parameters
    given = dict(arguments)
    first = next(v for v in given.values() if isinstance(v, torch.Tensor))
    if op == "window_attention":
        given |= {"window": (given["wh"], given["ww"]), "shift": (given["sh"], given["sw"])}
    if op == "mlp" and given["grn_weight"] is not None:
        given["grn"] = (given["grn_weight"], given["grn_bias"], given["grn_eps"])
    found: dict[str, Any] = {}
    for name, parameter in public.items():
        if name == "backend" or name not in given:
            continue
        value = given[name]
        if value is None or (isinstance(value, str) and value == _ABSENT.get(name)):
            if parameter.default is not None:
                found[name] = None
        elif isinstance(value, torch.Tensor) or value != parameter.default:
            found[name] = _described(value)
    lower = library.autocast_dtype(first.device)
    return Problem(op, _name(first.dtype), found, _name(lower) if lower else "")


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Described.of(value)
    if isinstance(value, torch.dtype):
        return _name(value)
    if isinstance(value, (tuple, list)):
        return [_described(v) for v in value]
    return value


def _encoded(value: Any) -> Any:
    if isinstance(value, Described):
        return {"shape": list(value.shape), "strides": list(value.strides), "dtype": value.dtype}
    if isinstance(value, dict):
        return {name: _encoded(v) for name, v in value.items()}
    return [_encoded(v) for v in value] if isinstance(value, list) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"shape", "strides", "dtype"}:
        return Described(tuple(value["shape"]), tuple(value["strides"]), value["dtype"])
    if isinstance(value, dict):
        return {name: _decoded(v) for name, v in value.items()}
    return [_decoded(v) for v in value] if isinstance(value, list) else value


def _tensors(value: Any) -> Iterator[Described]:
    if isinstance(value, Described):
        yield value
    elif isinstance(value, (Mapping, list)):
        for v in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(v)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _arguments(problem: Problem, generator: torch.Generator) -> Arguments:
    """Values for a recorded call, by the names of its arguments."""
    found = {}
    for name, value in problem.arguments.items():
        if name == "out_dtype":
            found[name] = value and getattr(torch, value)
        elif isinstance(value, list):
            names = (f"{name}_weight", f"{name}_bias") if name == "grn" else ()
            drawn = [
                _placed(names[i], v, generator) if isinstance(v, Described) else v
                for i, v in enumerate(value)
            ]
            found[name] = tuple(drawn)
        else:
            found[name] = _placed(name, value, generator) if isinstance(value, Described) else value
    return (), found


def _placed(name: str, like: Described, generator: torch.Generator) -> torch.Tensor:
    """A tensor of these strides; elements that share a place in memory share a value."""
    found = torch.zeros(like.span, dtype=getattr(torch, like.dtype))
    found = found.as_strided(like.shape, like.strides)
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in like.strides)
    target = found[once]
    target.copy_(_drawn(name, target.shape, found.dtype, generator))
    return found


def _drawn(
    name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Values such as an argument of this name has in models; N(0, 1) where nothing is known."""
    wide = torch.float64

    def normal(*size: int) -> torch.Tensor:
        return randn(generator, *size, dtype=wide)

    if not dtype.is_floating_point:
        found = torch.randint(0, 256, shape, generator=generator)
        if dtype == torch.bool:
            found = found < 200
            found[..., :1] = True  # a query that sees no key has a sample of its own
        return found
    if name == "rope":  # of angles, sine and cosine side by side
        angles = normal(*shape[:-1], shape[-1] // 2) * math.pi
        return torch.cat((angles.sin(), angles.cos()), -1)
    if name == "drop_scale":
        return (torch.rand(shape, generator=generator) < 0.75) / 0.75
    if name == "logit_scale":
        return math.log(10) + 0.3 * normal(*shape)
    if name == "std":
        return 0.25 + 0.1 * torch.rand(shape, generator=generator, dtype=wide)
    if name.endswith("weight") and len(shape) == 1:
        return 1 + 0.1 * normal(*shape)
    if "weight" in name:
        return normal(*shape) / math.sqrt(max(1, math.prod(shape[1:])))
    return normal(*shape) * (0.1 if "bias" in name and len(shape) == 1 else 1.0)
