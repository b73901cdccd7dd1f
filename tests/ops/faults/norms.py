"""Faults of norms: over rows, with residuals, after merging, over positions, over groups."""

from __future__ import annotations

import torch

from tests.ops.faults.ways import (
    in_bfloat16,
    none,
    on_argument,
    on_call,
    on_field,
    on_only_output,
    on_output,
    swapped,
    truncated,
    unwritten_last_row,
    unwritten_tail_of_channels,
)


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


def rows_before_columns(t):
    """Channels top left, top right, bottom left, bottom right."""
    return torch.cat([t.chunk(4, -1)[i] for i in (0, 2, 1, 3)], -1)


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
