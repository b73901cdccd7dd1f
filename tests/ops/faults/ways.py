"""Ways to break the result of a kernel, of which the faults of each op are made."""

from __future__ import annotations

import torch


def on_output(change, index=0):
    """A sound kernel, but `change` is applied to one of its outputs."""

    def fault(sound, *args):
        outputs = list(sound(*args))
        if outputs[index].numel():
            outputs[index] = change(outputs[index])
        return tuple(outputs)

    return fault


def on_only_output(change):
    return lambda sound, *args: change(sound(*args))


def on_argument(index, change):
    """A sound kernel that gets another value of one argument."""

    def fault(sound, *args):
        args = list(args)
        if args[index] is not None:
            args[index] = change(args[index])
        return sound(*args)

    return fault


def on_call(change, index=0):
    """A sound kernel that gets another call record; `index` is the record's place."""
    return on_argument(index, change)


def on_field(name, change, index=0):
    """A sound kernel that gets another value of one field of its call record."""

    def changed(call):
        value = getattr(call, name)
        return call if value is None else call._replace(**{name: change(value)})

    return on_call(changed, index)


def unwritten_last_row(t):
    fresh = torch.empty(t.shape, dtype=t.dtype)
    if t.ndim > 1:
        fresh[..., :-1, :] = t[..., :-1, :]
    return fresh


def unwritten_tail_of_channels(t):
    fresh = torch.empty(t.shape, dtype=t.dtype)
    whole = t.shape[-1] // 16 * 16
    fresh[..., :whole] = t[..., :whole]
    return fresh


def truncated(t):
    """Two more bits lost than in rounding to bfloat16, towards zero."""
    return (t.float().view(torch.int32) >> 17 << 17).view(torch.float32).to(t.dtype)


def in_bfloat16(t):
    return t.bfloat16().to(t.dtype)


def swapped(first, second):
    def fault(sound, *args):
        outputs = list(sound(*args))
        if outputs[first].shape == outputs[second].shape:
            outputs[first], outputs[second] = outputs[second], outputs[first]
        return tuple(outputs)

    return fault


def none(_):
    return None
