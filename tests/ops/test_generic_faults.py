"""The generic numerics tests catch broken kernels: each fault here must be rejected on some sample.

A fault replaces the forward or backward of the op's first backend. The sample that rejects it
passes with the sound backend, so that the fault alone is what was caught.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise

import pytest
import torch

import vitfast.ops as ops
from vitfast.errors import BackendUnavailableError
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong

pytestmark = pytest.mark.usefixtures("needs_native")


# ---- ways to break a result ----------------------------------------------------------------------


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


# ---- norms ---------------------------------------------------------------------------------------


def _norm(x, weight, bias, divisor, mean):
    x32 = x.float()
    y = (x32 - mean) / divisor
    y = y if weight is None else y * weight.float()
    return y if bias is None else y + bias.float()


def eps_outside_the_root(sound, call):
    x32 = call.x.float()
    std = x32.var(-1, correction=0, keepdim=True).sqrt()
    y = _norm(call.x, call.weight, call.bias, std + call.eps, x32.mean(-1, keepdim=True))
    return y.to(call.out_dtype or call.x.dtype), sound(call)[1]


def unbiased_variance(sound, call):
    x32 = call.x.float()
    std = (x32.var(-1, correction=1, keepdim=True) + call.eps).sqrt()
    y = _norm(call.x, call.weight, call.bias, std, x32.mean(-1, keepdim=True))
    return y.to(call.out_dtype or call.x.dtype), sound(call)[1]


def variance_in_one_pass(sound, call):
    x32 = call.x.float()
    mean = x32.mean(-1, keepdim=True)
    std = (x32.square().mean(-1, keepdim=True) - mean.square() + call.eps).clamp_min(0).sqrt()
    y = _norm(call.x, call.weight, call.bias, std, mean)
    return y.to(call.out_dtype or call.x.dtype), sound(call)[1]


def mean_term_missing(sound, grad, call, stats):
    dx, *others = sound(grad, call, stats)
    scaled = grad if call.weight is None else grad * call.weight
    rstd = stats[:, 1].view(*call.x.shape[:-1], 1)
    return (dx + scaled.mean(-1, keepdim=True) * rstd, *others)


def last_row_left_out_of_sums(sound, grad, *rest):
    short = grad.clone()
    short.view(-1, grad.shape[-1])[-1] = 0
    return (sound(grad, *rest)[0], *sound(short, *rest)[1:])


def residual_dropped(sound, call):
    return (call.x, *sound(call)[1:])


def sum_normalised(call):
    return call._replace(branch=(call.x + call.branch).to(call.branch.dtype))


def bias_not_scaled(sound, call):
    y, stats = sound(call._replace(bias=None))
    return y if call.bias is None else (y + call.bias).to(y.dtype), stats


def sums_not_scaled(sound, grad, call, stats):
    dbranch, *_ = sound(grad, call, stats)
    return dbranch, *sound(grad, call._replace(drop_scale=None), stats)[1:]


def padding_left_out_of_statistics(sound, call):
    """Each row's statistics over the pixels that exist."""
    y, stats = sound(call)
    if call.norm is None:
        return y, stats
    plain = call._replace(weight=None, bias=None, norm=None)
    rows, ones = (sound(plain._replace(x=t))[0] for t in (call.x, torch.ones_like(call.x)))
    count = ones.float().sum(-1, keepdim=True)
    mean = rows.float().sum(-1, keepdim=True) / count if call.norm == "layer" else 0.0
    var = ((rows.float() - mean) * ones.float()).square().sum(-1, keepdim=True) / count
    root = (var + call.eps).sqrt()
    return _norm(rows, call.weight, call.bias, root, mean).to(y.dtype), stats


NORMS = {
    "layer_norm forward eps_outside_the_root": eps_outside_the_root,
    "layer_norm forward unbiased_variance": unbiased_variance,
    "layer_norm forward variance_in_one_pass": variance_in_one_pass,
    "layer_norm forward bias_dropped": on_field("bias", none),
    "layer_norm forward weight_plus_one": on_field("weight", lambda w: w + 1),
    "layer_norm forward weight_in_bfloat16": on_field("weight", in_bfloat16),
    "layer_norm forward last_row_unwritten": on_output(unwritten_last_row),
    "layer_norm forward tail_unwritten": on_output(unwritten_tail_of_channels),
    "layer_norm forward truncated": on_output(truncated),
    "layer_norm forward in_bfloat16": on_output(in_bfloat16),
    "layer_norm backward statistics_in_bfloat16": on_argument(2, in_bfloat16),
    "layer_norm backward mean_term_missing": mean_term_missing,
    "layer_norm backward last_row_left_out_of_sums": last_row_left_out_of_sums,
    "layer_norm backward bias_gradient_twice": on_output(lambda t: 2 * t, 2),
    "layer_norm backward tail_unwritten": on_output(unwritten_tail_of_channels, 1),
    "layer_norm backward weight_and_bias_swapped": swapped(1, 2),
    "rms_norm forward eps_dropped": on_field("eps", lambda eps: 0.0),
    "rms_norm backward truncated": on_output(truncated),
    "rms_norm backward last_row_unwritten": on_output(unwritten_last_row),
    "add_norm forward residual_dropped": residual_dropped,
    "add_norm forward gamma_ignored": on_field("gamma", none),
    "add_norm forward drop_scale_ignored": on_field("drop_scale", none),
    "add_norm forward other_norm": on_field("norm", lambda kind: "layer"),
    "add_norm backward stream_dropped": on_field("grad_residual", torch.zeros_like),
    "add_norm backward gamma_ignored": on_field("gamma", torch.ones_like),
    "add_norm backward drop_scale_of_another_sample": on_field("drop_scale", lambda s: s.flip(0)),
    "add_norm backward gamma_and_weight_swapped": swapped(2, 3),
    "norm_add forward stream_dropped": on_field("x", torch.zeros_like),
    "norm_add forward drop_scale_ignored": on_field("drop_scale", none),
    "norm_add forward bias_not_scaled": bias_not_scaled,
    "norm_add forward other_norm": on_field("norm", lambda kind: "layer"),
    "norm_add forward weight_in_bfloat16": on_field("weight", in_bfloat16),
    "norm_add forward sum_normalised": on_call(sum_normalised),
    "norm_add forward last_row_unwritten": on_output(unwritten_last_row),
    "norm_add backward drop_scale_ignored": on_field("drop_scale", none, 1),
    "norm_add backward drop_scale_of_another_sample": on_field(
        "drop_scale", lambda s: s.flip(0), 1
    ),
    "norm_add backward sums_not_scaled": sums_not_scaled,
    "norm_add backward statistics_in_bfloat16": on_argument(2, in_bfloat16),
    "norm_add backward last_row_left_out_of_sums": last_row_left_out_of_sums,
    "norm_add backward weight_and_bias_swapped": swapped(1, 2),
    "residual_add forward gamma_ignored": on_field("gamma", none),
    "residual_add forward drop_scale_ignored": on_field("drop_scale", torch.ones_like),
    "residual_add forward last_row_unwritten": on_only_output(unwritten_last_row),
    "residual_add backward gamma_ignored": on_field("gamma", torch.ones_like),
}


# ---- attention -----------------------------------------------------------------------------------


def later_mask(call):
    """Causal, but a query sees the key after it too."""
    if not call.is_causal:
        return call
    queries, keys = call.q.shape[1], (call.q if call.k is None else call.k).shape[1]
    keep = torch.ones(queries, keys, dtype=torch.bool).tril(1)
    mask = keep if call.mask is None else call.mask & keep
    return call._replace(is_causal=False, mask=mask)


def padded_key(call):
    """The first key takes part as a zero vector: padding that was not masked."""
    if call.k is None:
        return call
    return call._replace(k=torch.cat((torch.zeros_like(call.k[:, :1]), call.k[:, 1:]), 1))


def rope_turned_backwards(call):
    if call.rope is None:
        return call
    turned = call.rope.clone()
    half = turned.shape[-1] // 2
    turned[..., :half] = -turned[..., :half]
    return call._replace(rope=turned)


def shifted_prefix(call):
    if call.rope is None or not call.rope_prefix:
        return call
    first = call.rope[..., :1, :]
    rope = torch.cat((first, call.rope), -2)
    return call._replace(rope=rope, rope_prefix=call.rope_prefix - 1)


def mean_of_values_where_blind(sound, call):
    out, stats = sound(call)
    v = call.q[:, :, 2] if call.k is None else call.v
    blind = (out == 0).all(-1, keepdim=True)
    return torch.where(blind, v.mean(1, keepdim=True).to(out.dtype), out), stats


def not_rescaled(sound, call):
    """Half of the keys weighted by another maximum than the rest."""
    out, stats = sound(call)
    if call.k is None or call.k.shape[1] < 4:
        return out, stats
    k = call.k.clone()
    k[:, : k.shape[1] // 2] *= 1.01
    return sound(call._replace(k=k))[0], stats


def with_norm_weights_swapped(call):
    return call._replace(q_norm_weight=call.k_norm_weight, k_norm_weight=call.q_norm_weight)


ATTENTION = {
    "attention forward scale_dropped": on_call(lambda c: c._replace(scale=1.0)),
    "attention forward scale_off": on_call(lambda c: c._replace(scale=c.scale * 1.002)),
    "attention forward causal_off_by_one": on_call(later_mask),
    "attention forward mask_ignored": on_call(lambda c: c._replace(mask=None)),
    "attention forward bias_ignored": on_call(lambda c: c._replace(bias=None)),
    "attention forward padded_key": on_call(padded_key),
    "attention forward rope_dropped": on_call(lambda c: c._replace(rope=None)),
    "attention forward rope_turned_backwards": on_call(rope_turned_backwards),
    "attention forward rope_prefix_off_by_one": on_call(shifted_prefix),
    "attention forward rope_layout": on_call(lambda c: c._replace(rope_half=not c.rope_half)),
    "attention forward norm_eps": on_call(lambda c: c._replace(qk_norm_eps=1e-3)),
    "attention forward norm_weights_swapped": on_call(with_norm_weights_swapped),
    "attention forward mean_of_values_where_blind": mean_of_values_where_blind,
    "attention forward not_rescaled": not_rescaled,
    "attention forward heads_swapped": on_output(lambda o: o.roll(1, 2)),
    "attention forward batch_entries_swapped": on_output(lambda o: o.roll(1, 0)),
    "attention forward last_row_unwritten": on_output(unwritten_last_row),
    "attention forward tail_unwritten": on_output(unwritten_tail_of_channels),
    "attention forward truncated": on_output(truncated),
    "attention forward in_bfloat16": on_output(in_bfloat16),
    "attention forward scaled": on_output(lambda o: o * 1.01),
    "attention backward dq_and_dk_swapped": swapped(0, 1),
    "attention backward scaled": on_argument(0, lambda g: g * 1.01),
    "attention backward scale_off": on_call(lambda c: c._replace(scale=c.scale * 1.01), 1),
    "attention backward mask_ignored": on_call(lambda c: c._replace(mask=None), 1),
    "attention backward causal_off_by_one": on_call(later_mask, 1),
    "attention backward rope_not_turned_back": on_call(lambda c: c._replace(rope=None), 1),
    "attention backward truncated": on_output(truncated),
    "attention backward last_row_unwritten": on_output(unwritten_last_row, 1),
    "attention backward delta_of_another_row": on_argument(2, lambda out: out.roll(1, 1)),
}


# ---- varlen_attention ----------------------------------------------------------------------------


def every_end_one_early(offsets):
    """The last token of each sequence but the last goes to the next one."""
    inner = (offsets[1:-1] - 1).clamp(min=0)
    return torch.cat((offsets[:1], inner, offsets[-1:]))


def one_sequence(offsets):
    return offsets[[0, -1]]


def lengths_backwards(offsets):
    return torch.cat((offsets[:1], offsets.diff().flip(0).cumsum(0, dtype=torch.int32)))


def first_left_out(offsets):
    return torch.cat((offsets[:1], offsets[2:])) if len(offsets) > 2 else offsets


def sequences_swapped(sound, call):
    """The results of the first two sequences of one length trade places."""
    out, stats = sound(call)
    spans = list(pairwise(call.cu_seqlens.tolist()))
    for (a, b), (c, d) in zip(spans, spans[1:], strict=False):
        if b - a == d - c:
            out = torch.cat((out[:a], out[c:d], out[a:b], out[d:]))
            break
    return out, stats


def last_sequence_unwritten(sound, call):
    out, stats = sound(call)
    begin = call.cu_seqlens.tolist()[-2]
    return torch.cat((out[:begin], torch.empty_like(out[begin:]))), stats


def rope_of_the_token_before(rope):
    """Every token takes the embedding of the token before it."""
    return rope.roll(1, -2)


VARLEN = {
    "varlen_attention forward ends_one_early": on_field("cu_seqlens", every_end_one_early),
    "varlen_attention forward one_sequence": on_field("cu_seqlens", one_sequence),
    "varlen_attention forward lengths_backwards": on_field("cu_seqlens", lengths_backwards),
    "varlen_attention forward boundary_left_out": on_field("cu_seqlens", first_left_out),
    "varlen_attention forward sequences_swapped": sequences_swapped,
    "varlen_attention forward last_sequence_unwritten": last_sequence_unwritten,
    "varlen_attention forward rope_of_another_token": on_field("rope", rope_of_the_token_before),
    "varlen_attention forward rope_dropped": on_field("rope", none),
    "varlen_attention forward norm_weights_swapped": on_call(with_norm_weights_swapped),
    "varlen_attention forward causality_ignored": on_field("is_causal", lambda causal: False),
    "varlen_attention forward scale_off": on_field("scale", lambda s: s * 1.01),
    "varlen_attention forward in_bfloat16": on_output(in_bfloat16),
    "varlen_attention backward ends_one_early": on_field("cu_seqlens", every_end_one_early, 1),
    "varlen_attention backward one_sequence": on_field("cu_seqlens", one_sequence, 1),
    "varlen_attention backward dq_and_dk_swapped": swapped(0, 1),
    "varlen_attention backward rope_not_turned_back": on_field("rope", none, 1),
    "varlen_attention backward norm_gradient_halved": on_output(lambda g: g * 0.5, 3),
    "varlen_attention backward statistics_of_another_head": on_argument(3, lambda s: s.roll(1, 1)),
}


# ---- linear_act and patch_embed ------------------------------------------------------------------


OTHER_GATE = {"": "", "first": "last", "last": "first"}


def other_act(old, new):
    return on_field("act", lambda act: new if act == old else act)


def quick_gelu_of_1_7(sound, call):
    y, z = sound(call)
    if call.act != "quick_gelu":
        return y, z
    linear = torch.nn.functional.linear(call.x.float(), call.weight.float(), call.bias.float())
    return (linear * torch.sigmoid(1.7 * linear)).to(y.dtype), z


def first_weight_forever():
    """A prepacked weight that is not dropped when the weight changes."""
    kept = {}

    def fault(sound, call):
        weight = kept.setdefault(tuple(call.weight.shape), torch.randn_like(call.weight))
        return sound(call._replace(weight=weight))

    return fault


GEMMS = {
    "linear_act forward gelu_tanh_for_erf": other_act("gelu", "gelu_tanh"),
    "linear_act forward quick_gelu_of_1_7": quick_gelu_of_1_7,
    "linear_act forward bias_dropped": on_field("bias", none),
    "linear_act forward other_half_gates": on_field("gate", OTHER_GATE.get),
    "linear_act forward stale_weight": first_weight_forever(),
    "linear_act forward truncated": on_output(truncated),
    "linear_act forward last_row_unwritten": on_output(unwritten_last_row),
    "linear_act forward operand_in_bfloat16": on_field("x", in_bfloat16),
    "linear_act backward derivative_left_out": other_act("gelu", "none"),
    "linear_act backward activation_in_bfloat16": on_field("z", in_bfloat16),
    "linear_act backward bias_gradient_twice": on_output(lambda t: 2 * t, 2),
    "patch_embed forward patch_transposed": on_field("weight", lambda w: w.mT),
    "patch_embed forward bias_dropped": on_field("bias", none),
    "patch_embed forward pos_embed_dropped": on_field("pos_embed", none),
    "patch_embed forward mean_ignored": on_field("mean", none),
    "patch_embed forward std_off": on_field("std", lambda s: s * 255 / 256),
    "patch_embed forward channels_reversed": on_field("image", lambda i: i.flip(1)),
    "patch_embed forward images_swapped": on_field("image", lambda i: i.roll(1, 0)),
    "patch_embed forward prefix_at_the_end": on_only_output(lambda t: t.roll(-1, 1)),
    "patch_embed forward last_row_unwritten": on_only_output(unwritten_last_row),
    "patch_embed backward tokens_off_by_one": on_argument(0, lambda g: g.roll(1, 1)),
}
MLP = {
    "mlp forward gelu_tanh_for_erf": other_act("gelu", "gelu_tanh"),
    "mlp forward first_bias_dropped": on_field("bias1", none),
    "mlp forward second_bias_dropped": on_field("bias2", none),
    "mlp forward other_half_gates": on_field("gate", OTHER_GATE.get),
    "mlp forward hidden_units_out_of_step": on_field("weight2", lambda w: w.roll(1, 1)),
    "mlp forward truncated": on_output(truncated),
    "mlp backward derivative_left_out": other_act("gelu", "none"),
    "mlp backward activation_in_bfloat16": on_field("z", in_bfloat16),
    "mlp backward weight_not_transposed_back": on_field("weight2", lambda w: w.roll(1, 0)),
    "mlp backward first_bias_gradient_twice": on_output(lambda t: 2 * t, 2),
    "mlp backward second_weight_gradient_off_by_one": on_output(lambda t: t.roll(1, 0), 3),
}


def rows_before_columns(t):
    """Channels top left, top right, bottom left, bottom right."""
    return torch.cat([t.chunk(4, -1)[i] for i in (0, 2, 1, 3)], -1)


PATCHES = {
    "patch_merge forward rows_before_columns": on_output(rows_before_columns),
    "patch_merge forward padding_left_out_of_statistics": padding_left_out_of_statistics,
    "patch_merge forward images_swapped": on_field("x", lambda x: x.roll(1, 0)),
    "patch_merge forward patches_off_by_one": on_output(lambda y: y.roll(1, 2)),
    "patch_merge forward weight_in_bfloat16": on_field("weight", in_bfloat16),
    "patch_merge forward bias_dropped": on_field("bias", none),
    "patch_merge forward norm_left_out": on_field("norm", none),
    "patch_merge forward last_row_unwritten": on_output(unwritten_last_row),
    "patch_merge forward truncated": on_output(truncated),
    "patch_merge backward rows_before_columns": on_argument(0, rows_before_columns),
    "patch_merge backward last_row_unwritten": on_output(unwritten_last_row),
    "patch_merge backward statistics_in_bfloat16": on_argument(2, in_bfloat16),
    "patch_merge backward bias_gradient_twice": on_output(lambda t: 2 * t, 2),
    "patch_merge backward weight_and_bias_swapped": swapped(1, 2),
}


def axes_of_the_shift_swapped(call):
    return call._replace(sh=min(call.sw, call.wh - 1), sw=min(call.sh, call.ww - 1))


def shift_dropped(call):
    return call._replace(sh=0, sw=0)


WINDOWS = {
    "window_attention forward shift_dropped": on_call(shift_dropped),
    "window_attention forward axes_of_the_shift_swapped": on_call(axes_of_the_shift_swapped),
    "window_attention forward table_upside_down": on_field("table", lambda t: t.flip(0)),
    "window_attention forward bias_dropped": on_field("table", none),
    "window_attention forward padding_as_zeros": on_field("pad", none),
    "window_attention forward dot_for_cosine": on_field("logit_scale", none),
    "window_attention forward largest_scale_of_50": on_field(
        "logit_scale", lambda s: s.clamp(max=3.912)
    ),
    "window_attention forward pads_before_it_rolls": on_field("roll_first", lambda b: not b),
    "window_attention forward windows_for_a_grid": on_field("grid", lambda grid: False),
    "window_attention forward heads_swapped": on_output(lambda o: o.roll(1, 3)),
    "window_attention forward images_swapped": on_output(lambda o: o.roll(1, 0)),
    "window_attention forward last_row_unwritten": on_output(unwritten_last_row),
    "window_attention forward truncated": on_output(truncated),
    "window_attention backward dq_and_dk_swapped": on_output(lambda g: g[:, :, :, [1, 0, 2]]),
    "window_attention backward truncated": on_output(truncated),
    "window_attention backward shift_dropped": on_call(shift_dropped),
    "window_attention backward table_upside_down": on_output(lambda t: t.flip(0), 1),
    "window_attention backward padding_twice": on_output(lambda t: 2 * t, 2),
    "window_attention backward exponential_of_the_scale_left_out": on_output(lambda t: t / 4, 3),
    "window_attention backward statistics_of_another_row": on_field(
        "stats", lambda s: s.roll(1, -1)
    ),
}
DWCONV = {
    "dwconv_norm forward kernel_upside_down": on_field("weight", lambda w: w.flip(2)),
    "dwconv_norm forward kernel_mirrored": on_field("weight", lambda w: w.flip(3)),
    "dwconv_norm forward channels_off_by_one": on_field("weight", lambda w: w.roll(1, 0)),
    "dwconv_norm forward bias_dropped": on_field("bias", none),
    "dwconv_norm forward norm_weight_in_bfloat16": on_field("norm_weight", in_bfloat16),
    "dwconv_norm forward norm_bias_dropped": on_field("norm_bias", none),
    "dwconv_norm forward eps_dropped": on_field("eps", lambda eps: 1e-12),
    "dwconv_norm forward other_norm": on_field("norm", lambda n: "layer" if n == "rms" else n),
    "dwconv_norm forward images_swapped": on_field("x", lambda x: x.roll(1, 0)),
    "dwconv_norm forward operand_in_bfloat16": on_field("x", in_bfloat16),
    "dwconv_norm forward last_row_unwritten": on_output(unwritten_last_row),
    "dwconv_norm forward tail_unwritten": on_output(unwritten_tail_of_channels),
    "dwconv_norm forward truncated": on_output(truncated),
    "dwconv_norm backward kernel_not_flipped": on_field("weight", lambda w: w.flip(2, 3)),
    "dwconv_norm backward bias_left_out_again": on_field("bias", torch.zeros_like),
    "dwconv_norm backward pixels_off_by_one": on_field("grad", lambda g: g.roll(1, 2)),
    "dwconv_norm backward statistics_in_bfloat16": on_field("stats", in_bfloat16),
    "dwconv_norm backward x_in_bfloat16": on_field("x", in_bfloat16),
    "dwconv_norm backward last_row_unwritten": on_output(unwritten_last_row),
    "dwconv_norm backward taps_off_by_one": on_output(lambda t: t.roll(1, 3), 1),
    "dwconv_norm backward bias_gradient_twice": on_output(lambda t: 2 * t, 2),
    "dwconv_norm backward bias_and_norm_bias_swapped": swapped(2, 4),
    "dwconv_norm backward weight_truncated": on_output(truncated, 1),
}


def statistics_of_the_batch(sound, call):
    y, norms = sound(call._replace(x=call.x.flatten(0, 1)[None]))
    return y.reshape(call.x.shape), norms


def residual_left_out(sound, call):
    y, norms = sound(call)
    return y - call.x, norms


def norms_held_constant(sound, grad, call, norms):
    n = norms / (norms.mean(-1, keepdim=True) + call.eps)
    n = n[(slice(None), *(None,) * (call.x.ndim - 2))]
    dx = (grad * (1 + call.weight * n)).to(call.x.dtype)
    return dx, *sound(grad, call, norms)[1:]


GRN = {
    "grn forward statistics_of_the_batch": statistics_of_the_batch,
    "grn forward residual_left_out": residual_left_out,
    "grn forward eps_left_out": on_field("eps", lambda eps: eps / 1000),
    "grn forward images_swapped": on_field("x", lambda x: x.roll(1, 0)),
    "grn forward weight_in_bfloat16": on_field("weight", in_bfloat16),
    "grn forward bias_dropped": on_field("bias", torch.zeros_like),
    "grn forward last_row_unwritten": on_output(unwritten_last_row),
    "grn forward truncated": on_output(truncated),
    "grn backward norms_held_constant": norms_held_constant,
    "grn backward norms_of_another_image": on_argument(2, lambda g: g.roll(1, 0)),
    "grn backward norms_in_bfloat16": on_argument(2, in_bfloat16),
    "grn backward last_row_unwritten": on_output(unwritten_last_row),
    "grn backward weight_and_bias_swapped": swapped(1, 2),
    "grn backward bias_gradient_twice": on_output(lambda t: 2 * t, 2),
}


def over_groups(change):
    """As the op, but with its statistics, [B, G, 1] each, as `change` makes them of x's groups."""

    def fault(sound, call):
        x, weight, bias = call.x, call.weight, call.bias
        rows = x.float().reshape(x.shape[0], call.groups, -1)
        mean, var = change(rows)
        y = ((rows - mean) / (var + call.eps).sqrt()).view(x.shape)
        y = y if weight is None else y * weight.float()[:, None, None]
        y = y if bias is None else y + bias.float()[:, None, None]
        y = y if call.residual is None else y + call.residual.float()
        y = y.relu() if call.act == "relu" else y
        good, stats = sound(call)
        return good.copy_(y), stats

    return fault


def _moments(rows):
    return rows.mean(-1, keepdim=True), rows.var(-1, correction=0, keepdim=True)


def _in_one_pass(rows):
    mean = rows.mean(-1, keepdim=True)
    return mean, (rows.square().mean(-1, keepdim=True) - mean.square()).clamp_min(0)


def _last_left_out(rows):
    return _moments(rows[..., :-1] if rows.shape[-1] > 2 else rows)


def _over_all_groups(rows):
    return rows.mean((1, 2), keepdim=True), rows.var((1, 2), correction=0, keepdim=True)


def residual_after_relu(sound, call):
    y, stats = sound(call._replace(residual=None))
    return y if call.residual is None else (y + call.residual).to(y.dtype), stats


GROUPS = {
    "group_norm_act forward variance_in_one_pass": over_groups(_in_one_pass),
    "group_norm_act forward last_pixel_left_out": over_groups(_last_left_out),
    "group_norm_act forward one_group_for_all": over_groups(_over_all_groups),
    "group_norm_act forward unbiased_variance": over_groups(
        lambda rows: (_moments(rows)[0], rows.var(-1, keepdim=True))
    ),
    "group_norm_act forward weight_in_bfloat16": on_field("weight", in_bfloat16),
    "group_norm_act forward bias_dropped": on_field("bias", none),
    "group_norm_act forward residual_dropped": on_field("residual", none),
    "group_norm_act forward residual_after_relu": residual_after_relu,
    "group_norm_act forward relu_left_out": on_field("act", lambda act: "none"),
    "group_norm_act forward images_swapped": on_field("x", lambda x: x.roll(1, 0)),
    "group_norm_act forward last_row_unwritten": on_output(unwritten_last_row),
    "group_norm_act forward truncated": on_output(truncated),
    "group_norm_act backward gradient_past_relu": on_field("y", torch.ones_like),
    "group_norm_act backward statistics_in_bfloat16": on_field("stats", in_bfloat16),
    "group_norm_act backward last_row_unwritten": on_output(unwritten_last_row),
    "group_norm_act backward residual_twice": on_output(lambda t: 2 * t, 1),
    "group_norm_act backward weight_and_bias_swapped": swapped(2, 3),
    "group_norm_act backward weight_ignored": on_field("weight", torch.ones_like),
}
FAULTS = NORMS | GROUPS | ATTENTION | VARLEN | GEMMS | MLP | PATCHES | WINDOWS | DWCONV | GRN


def judge(case, which, backend):
    if which == "forward":
        return case.judge(case.outputs(backend=backend))
    return case.judge_gradients(case.gradients(case.trained, backend=backend))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch):
    op, which, _ = fault.split()
    spec = ops.spec_of(op)
    name, backend = next(iter(spec.dispatcher.backends.items()))
    sound = getattr(backend, which)
    broken = dataclasses.replace(backend, **{which: partial(FAULTS[fault], sound)})
    for sample in (s for s in spec.samples if s.tags.isdisjoint({"real", "large", "empty"})):
        for dtype in spec.dtypes:
            case = Case(spec, sample, dtype)
            try:
                raise_if_wrong(judge(case, which, name))
            except (AssertionError, BackendUnavailableError):
                continue  # tells nothing about the fault
            with monkeypatch.context() as patch:
                patch.setitem(spec.dispatcher.backends, name, broken)
                try:
                    raise_if_wrong(judge(case, which, name))
                except AssertionError:
                    return
    pytest.fail(f"no sample of {op} notices this fault")


def test_every_op_has_faults_in_both_directions():
    found = {tuple(fault.split()[:2]) for fault in FAULTS}
    assert found == {(op, which) for op in ops.NAMES for which in ("forward", "backward")}
