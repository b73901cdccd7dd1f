"""Faults of linear layers, MLPs, patch embedding and depthwise convolution."""

from __future__ import annotations

import torch

from tests.ops.faults.ways import (
    in_bfloat16,
    none,
    on_argument,
    on_field,
    on_only_output,
    on_output,
    swapped,
    truncated,
    unwritten_last_row,
    unwritten_tail_of_channels,
)

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
