"""Faults of attention: over all tokens, within packed sequences and within windows."""

from __future__ import annotations

from itertools import pairwise

import torch

from tests.ops.faults.ways import (
    in_bfloat16,
    none,
    on_argument,
    on_call,
    on_field,
    on_output,
    swapped,
    truncated,
    unwritten_last_row,
    unwritten_tail_of_channels,
)


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
