"""What all drop-in layers share."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from vitfast.engine import donation, memo
from vitfast.engine.eligibility import plan_call, planned
from vitfast.layers import subclass
from vitfast.layers.reading.children import TIMM_CLASSES, describe_called
from vitfast.plans import Unfit

NORM = ("layer_norm", "rms_norm")
MLP = ("linear_act", "mlp", *NORM)
ATTENTION = ("attention", *MLP)
WINDOWS = ("window_attention", *MLP)
BLOCK = ("add_norm", "norm_add", "residual_add", *ATTENTION)
WINDOWED_BLOCK = ("add_norm", "norm_add", "residual_add", *WINDOWS)
CONVNEXT = ("dwconv_norm", "grn", "residual_add", *MLP)
"""The `ops` of common kinds of layers, whatever norm a model has."""


class Layer:
    """Mixin of a drop-in layer: a subclass of one timm class that overrides `forward` only; here,
    what moves weights elsewhere also lets go of what was kept of them.

    A module becomes a drop-in by `module.__class__ = layer_class` and timm's own again by
    `module.__class__ = layer_class.timm_class`: nothing else about it changes.
    """

    timm_class: ClassVar[type[nn.Module]]
    role: ClassVar[str] = "part"  # or "attention" or "block": what a strict swap insists on
    ops: ClassVar[tuple[str, ...]] = ()  # of `vitfast.ops`, that a fused forward may run
    by_shape: ClassVar[bool] = False  # whether only what `plan` takes is known at all

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.timm_class = next(base for base in cls.__bases__ if issubclass(base, nn.Module))
        if cls.__module__.startswith("vitfast.layers."):  # one of others' has a forward to call
            TIMM_CLASSES[cls] = cls.timm_class

    @classmethod
    def plan(cls, module: nn.Module) -> object:
        """What a fused forward of this module would use.

        Raises:
            Unfit: it has to run timm's forward as things stand.
            Unsupported: it always will.
        """
        return None

    def _plan_call(self, x: object, *others: object) -> Any:
        """This layer's plan, made anew; None where this call has to run timm's forward.

        Args:
            x, others: all tensors that the forward was given; None for those it was not.
        """
        return plan_call(type(self).plan, self, x, *others)  # type: ignore[arg-type]

    def _recall_plan(self, x: object, *others: object) -> Any:
        """As `_plan_call`, of a plan that is kept while nothing about the module changes."""
        return memo.recall_plan(type(self).plan, self, x, *others)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """timm's forward: what a layer's own calls where it cannot run fused.

        Inputs of a plain subclass of torch.Tensor come here, and go back to the layer's own
        forward as tensors: elsewhere nothing has to look for them.
        """
        theirs = super().forward  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return theirs(*args, **kwargs)
        donation.withdraw()
        out = self._theirs(theirs, args, kwargs)
        donation.withdraw()
        return out

    def _theirs(self, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """timm's forward, or this layer's own on plain tensors."""
        kind = subclass.kind_of((*args, *kwargs.values()))
        if kind is None:
            return theirs(*args, **kwargs)
        try:
            plan = planned(self.plan, self)  # type: ignore[arg-type]
        except Unfit:
            return theirs(*args, **kwargs)
        if list(describe_called(plan)):  # which is to see the subclass, as in timm
            return theirs(*args, **kwargs)
        return subclass.run_plain(self.forward, kind, args, kwargs)

    def _as_timm(self, *args: Any, **kwargs: Any) -> Any:
        """timm's forward of a layer that is made of drop-ins: each of them looks at the class of
        its inputs itself, and at what of it is called."""
        donation.withdraw()
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        donation.withdraw()
        return out

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        memo.forget(self)  # type: ignore[arg-type]
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        memo.forget(self)  # type: ignore[arg-type]
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> Layer:
        """Called by `torch.jit.script`, which compiles source code: give it timm's class.

        torch puts what it gets here into the very model it was asked to script, so the model is
        restored by it.
        """
        warnings.warn(
            "torch.jit.script restores the vitfast layers of the model it is given to timm's "
            "classes; call vitfast.swap(model) again to use them afterwards",
            stacklevel=2,
        )
        memo.forget(self)  # type: ignore[arg-type]
        self.__class__ = self.timm_class  # type: ignore[assignment]
        return self
