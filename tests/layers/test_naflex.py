"""NaFlexVit on images of different sizes: packed, as timm computes them, no padding computed."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import naflexvit
from torch import nn

import vitfast.layers as layers
from vitfast import restore, swap
from vitfast.blocks.packing import Packing
from vitfast.engine.memo import memos
from vitfast.engine.steps import PreparedBlock
from vitfast.layers import naflex
from vitfast.plans import Sequences
from vitfast.runtime.library import watching
from vitfast.settings import settings
from vitfast.testing.errors import compare
from vitfast.testing.inputs import to_float64

pytestmark = [pytest.mark.usefixtures("needs_native"), pytest.mark.timm("1.0.29")]
GRIDS = ((5, 7), (1, 1), (8, 8), (3, 4))
"""Of images: mixed aspect ratios, one of a single patch, one of full length."""
VARIANTS = {
    "average": {},
    "max": dict(global_pool="avgmax"),
    "class_token": dict(class_token=True, global_pool="token", reg_tokens=0),
    "no_prefix": dict(reg_tokens=0, final_norm=True, fc_norm=False),
    "prefix_pooled": dict(class_token=True, pool_include_prefix=True),
    "attention_pool": dict(global_pool="map", fc_norm=False),
    "key_only_mask": dict(use_key_only_attn_mask=True),
    "qk_norm": dict(qk_norm=True, init_values=None),
    "factorized": dict(pos_embed="factorized"),
    "rope_axial": dict(rope_type="axial", class_token=True),
    "rope_dinov3": dict(rope_type="dinov3", rope_rotate_half=True, qk_norm=True),
    "rope_mixed": dict(rope_type="mixed"),
    "swiglu_of_three_projections": dict(
        attn_type="rope", rope_type="axial", swiglu_mlp=True, qkv_fused=False, num_kv_heads=1,
        scale_attn_inner_norm=True,
    ),
}  # fmt: skip


def build(lively, **options):
    name = "naflexvit_base_patch16_gap"
    return lively(
        timm.create_model(name, depth=3, embed_dim=48, num_heads=3, num_classes=20, **options)
    ).eval()


def batch_of(grids=GRIDS, tokens=None, dtype=torch.float32, padding=0.0):
    """As timm's collator makes it: rows of patches, padded to so many tokens."""
    lengths = [rows * columns for rows, columns in grids]
    tokens = tokens or max(lengths)
    patches = torch.full((len(grids), tokens, 16 * 16 * 3), padding, dtype=dtype)
    coord = torch.zeros(len(grids), tokens, 2, dtype=torch.long)
    valid = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    for i, (rows, columns) in enumerate(grids):
        g = torch.Generator().manual_seed(100 * rows + columns)
        drawn = torch.randn(rows * columns, patches.shape[-1], generator=g)
        patches[i, : len(drawn)] = drawn.to(dtype)
        coord[i, : len(drawn)] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


@pytest.fixture
def packed(monkeypatch):
    """The rows of x in each call of a packed block."""
    rows, sound = [], naflex.run_packed_block

    def noted(x, *args, **kwargs):
        rows.append(x.shape[1])
        return sound(x, *args, **kwargs)

    monkeypatch.setattr(naflex, "run_packed_block", noted)
    return rows


def swapped(model):
    swap(ours := copy.deepcopy(model))
    assert type(ours) is layers.NaFlexVit
    return ours


@torch.no_grad()
def check(model, ours, batch, factor=2.0):
    """Against timm in float64, by the package's criterion but for (d): errors here have one cause
    a row."""
    truth, base, found = copy.deepcopy(model).double()(to_float64(batch)), model(batch), ours(batch)
    report = compare(found, truth, base, factor=factor, rms_factor=factor)
    assert not [p for p in report.problems if not p.startswith("(d)")], str(report)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(parity, lively, packed, name):
    """Outputs and all gradients. Those of mixed rotary embeddings have no kernels."""
    parity(build(lively, **VARIANTS[name]), batch_of(), backward=name != "rope_mixed")
    prefix = 4 + bool(VARIANTS[name].get("class_token"))
    prefix = {"class_token": 1, "no_prefix": 0}.get(name, prefix)
    total = sum(r * c + prefix for r, c in GRIDS)
    assert packed and set(packed) == {total}


@pytest.mark.parametrize("name", ["average", "attention_pool", "rope_axial", "qk_norm"])
def test_bfloat16(lively, packed, name):
    model = build(lively, **VARIANTS[name]).bfloat16()
    check(model, swapped(model), batch_of(dtype=torch.bfloat16))
    assert packed


@pytest.mark.parametrize("name", ["average", "rope_axial"])
def test_autocast(parity, lively, packed, name):
    model = build(lively, **VARIANTS[name])
    parity(model, batch_of(), autocast=torch.bfloat16, backward=False)
    assert packed


BATCHES = {
    "one_image": (((3, 4),), 20),
    "one_patch": (((1, 1),), 5),
    "alike_and_padded": (((3, 4), (4, 3), (2, 6)), 16),
    "long_and_thin": (((1, 40), (40, 1), (2, 2)), 41),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(lively, packed, name):
    model = build(lively, rope_type="axial")
    check(model, swapped(model), batch_of(*BATCHES[name]))
    assert packed


def test_more_rows_than_go_through_at_once(lively, packed):
    model = build(lively)
    check(model, swapped(model), batch_of(((30, 30), (40, 30), (2, 2))))
    assert packed[0] > 2048


def test_valid_patches_anywhere(lively, packed):
    """Padding need not come last."""
    model, batch = build(lively, rope_type="axial"), batch_of(((4, 4), (4, 4)))
    batch["patch_valid"][0, [0, 7, 8]] = False
    batch["patch_valid"][1, 3] = False
    check(model, swapped(model), batch)
    assert set(packed) == {13 + 15 + 2 * 4}


def test_all_valid_needs_neither_mask_nor_packing(lively, packed, monkeypatch, refusal):
    model, batch = build(lively), batch_of(((4, 4), (2, 8)))
    ours = swapped(model)
    check(model, ours, batch)
    monkeypatch.setattr(naflexvit, "create_attention_mask", refusal("a mask was made"))
    ours(batch)
    assert not packed


def test_no_mask_is_made(lively, packed, monkeypatch, refusal):
    ours = swapped(build(lively))
    monkeypatch.setattr(naflexvit, "create_attention_mask", refusal("a mask was made"))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            ours(batch_of())
    assert len(packed) == 6


# ---- no padding is computed ----------------------------------------------------------------------


def test_ops_see_valid_tokens_only(lively):
    ours, seen = swapped(build(lively)), []
    with watching(lambda op, given: seen.append((op, given.get("x", given.get("q"))))):
        ours(batch_of())
    total = sum(r * c + 4 for r, c in GRIDS)
    inside = [(op, t.shape[:-1].numel()) for op, t in seen if op in ("mlp", "add_norm")]
    assert inside == 3 * [("add_norm", total), ("mlp", total)]
    assert [len(t) for op, t in seen if op == "varlen_attention"] == 3 * [total]
    assert "attention" not in {op for op, _ in seen}


def test_the_engine_computes_valid_tokens_only(lively, monkeypatch):
    ours, rows = swapped(build(lively)), []
    project = PreparedBlock.project

    def noted(steps, x):
        rows.append(len(x))
        return project(steps, x)

    monkeypatch.setattr(PreparedBlock, "project", noted)
    with torch.no_grad():
        ours(batch_of(tokens=500))
    assert rows == 3 * [sum(r * c + 4 for r, c in GRIDS)]


@pytest.mark.parametrize("padding", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["average", "attention_pool", "max", "rope_axial"])
def test_what_padding_holds_does_not_matter(lively, name, padding):
    """Bit for bit; timm spreads a NaN there over everything."""
    ours = swapped(build(lively, **VARIANTS[name]))
    with torch.no_grad():
        assert torch.equal(ours(batch_of(padding=padding)), ours(batch_of()))


@pytest.mark.parametrize("name", ["average", "rope_axial"])
def test_how_much_padding_there_is_changes_roundings_of_the_embedding_only(lively, name):
    ours = swapped(build(lively, **VARIANTS[name]))
    with torch.no_grad():
        few, many = ours(batch_of(tokens=64)), ours(batch_of(tokens=300))
    torch.testing.assert_close(many, few, rtol=2e-6, atol=2e-6)


def test_neighbours_change_roundings_only(lively):
    ours = swapped(build(lively))
    with torch.no_grad():
        whole = ours(batch_of(tokens=80))
        for i, grid in enumerate(GRIDS):
            alone = ours(batch_of((grid,), tokens=80))
            torch.testing.assert_close(alone[0], whole[i], rtol=2e-6, atol=2e-6)


def test_little_is_prepared_for_many_totals(lively):
    """One preparation for all totals between two powers of two, not one a total."""
    ours = swapped(build(lively))
    mine = {id(m) for m in ours.blocks}
    with torch.no_grad():
        for n in range(2, 32):
            ours(batch_of(((4, n), (2, 3))))
    prepared = [len(m.prepared) for m in memos() if id(m.module()) in mine]
    assert prepared and max(prepared) <= 4


# ---- what runs timm's forward --------------------------------------------------------------------


class Other(timm.models.vision_transformer.Block):
    """A block of a user's own."""


def drop_paths(model):
    model.train()
    for block in model.blocks:
        block.drop_path1 = timm.layers.DropPath(0.5)


def other_block(model):
    model.blocks[1].__class__ = Other


def own_features(model):
    theirs = model.forward_features
    model.forward_features = lambda *args, **kwargs: theirs(*args, **kwargs)


LEFT_TO_TIMM = {
    "hook_on_a_block": lambda m: m.blocks[1].register_forward_hook(lambda *_: None),
    "hook_in_a_block": lambda m: m.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None),
    "hook_on_the_norm": lambda m: m.norm.register_forward_pre_hook(lambda *_: None),
    "checkpointing": lambda m: m.set_grad_checkpointing(),
    "a_block_of_another_class": other_block,
    "a_block_that_is_not_swapped": lambda m: restore(m.blocks[2]),
    "no_pooling": lambda m: setattr(m, "global_pool", ""),
    "replaced_method": own_features,
    "stochastic_depth": drop_paths,
}


@pytest.mark.parametrize("name", LEFT_TO_TIMM)
def test_left_to_timm(lively, packed, name):
    model = build(lively, fc_norm=False)
    ours = swapped(model)
    for each in (model, ours):
        LEFT_TO_TIMM[name](each)
    results = []
    for each in (model, ours):
        torch.manual_seed(3)
        results.append(each(batch_of()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert not packed


def test_calls_left_to_timm(lively, packed):
    model = build(lively)
    ours = swapped(model)
    plain = batch_of()
    blind = plain | {"patch_valid": plain["patch_valid"] & (torch.arange(4) != 1)[:, None]}
    mask = naflexvit.create_attention_mask(plain["patch_valid"], num_prefix_tokens=4)
    whole = plain | {"patch_valid": plain["patch_valid"].float()}
    for batch in (blind, plain | {"attn_mask": mask}, whole, torch.randn(2, 3, 48, 64)):
        torch.testing.assert_close(ours(batch), model(batch), rtol=1e-4, atol=1e-5)
    for option, value, usual in (("disable", True, False), ("backend", "reference", "auto")):
        setattr(settings, option, value)
        torch.testing.assert_close(ours(plain), model(plain), rtol=1e-4, atol=1e-5)
        setattr(settings, option, usual)
    assert not packed
    ours(plain)
    assert packed


def test_arguments_one_by_one(lively, packed):
    model = build(lively)
    ours, batch = swapped(model), batch_of()
    patches, coord, valid = batch.values()
    with torch.no_grad():
        want = model(batch)
        torch.testing.assert_close(ours(patches, coord, valid), want)
        torch.testing.assert_close(ours(patches, patch_valid=valid, patch_coord=coord), want)
    assert len(packed) == 6
    with pytest.raises(AssertionError, match="patch_valid is required"):
        ours(patches, coord)


def test_float64_is_left_to_timm(lively, packed):
    model, batch = build(lively).double(), to_float64(batch_of())
    torch.testing.assert_close(swapped(model)(batch), model(batch))
    assert not packed


def test_features_are_those_of_timm_padding_too(lively, packed):
    model = build(lively)
    ours, batch = swapped(model), batch_of()
    with torch.no_grad():
        want, found = model.forward_features(**batch), ours.forward_features(**batch)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        want, found = (
            m.forward_intermediates(batch, output_fmt="NLC", indices=2) for m in (model, ours)
        )
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert not packed


def test_patch_dropout_in_training(lively, packed):
    model = build(lively, patch_drop_rate=0.5)
    ours = swapped(model)
    check(model, ours, batch_of())
    count = len(packed)
    results = []
    for each in (model.train(), ours.train()):
        torch.manual_seed(3)
        results.append(each(batch_of()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert len(packed) == count == 3


# ---- swapping ------------------------------------------------------------------------------------


def test_report_and_restore(lively):
    model = build(lively)
    ours = copy.deepcopy(model)
    report = swap(ours)
    (entry,) = [e for e in report.swapped if not e.path]
    assert entry.layer_class == "vitfast.layers.NaFlexVit" and entry.note == ""
    assert "vitfast.layers.NaFlexVit" in str(report)
    assert list(ours.state_dict()) == list(model.state_dict())
    ours(batch_of())
    restore(ours)
    assert type(ours) is naflexvit.NaFlexVit
    with torch.no_grad():
        assert torch.equal(ours(batch_of()), model(batch_of()))


def test_the_report_says_why_not(lively):
    model = build(lively)
    model.blocks[1] = nn.Identity()
    left = {e.path: e.reason for e in swap(model).skipped}
    assert left[""] == "blocks.1 is a Identity, not timm's (Eva)Block"


def test_weights_may_change_between_calls(lively, packed):
    model = build(lively)
    ours, batch = swapped(model), batch_of()
    with torch.no_grad():
        for _ in range(3):
            ours(batch)
        for each in (model, ours):
            each.blocks[1].mlp.fc1.weight.mul_(1.5)
            each.blocks[2].attn.qkv.bias.add_(0.5)
    check(model, ours, batch)


# ---- faults --------------------------------------------------------------------------------------


def with_offsets(change):
    class Faulty(Packing):
        def __init__(self, *args):
            super().__init__(*args)
            offsets = change(list(self.sequences.offsets))
            made = torch.tensor(offsets, dtype=torch.int32)
            self.sequences = Sequences(made, tuple(offsets), offsets[-1])

    return Faulty


class ImagesSwapped(Packing):
    def unpack(self, packed):
        return super().unpack(packed).roll(1, 0)


class PrefixDropped(Packing):
    def unpack(self, packed):
        x = super().unpack(packed)
        return torch.cat((torch.zeros_like(x[:, : self._prefix]), x[:, self._prefix :]), 1)


class PrefixTurned(Packing):
    def pack_rope(self, rope):
        return super().pack_rope(rope).roll(-self._prefix, -2)


class PaddingPacked(Packing):
    def __init__(self, valid, lengths, prefix):
        lengths = [valid.shape[1]] * len(lengths)
        super().__init__(torch.ones_like(valid), lengths, prefix)


class TokensShifted(Packing):
    def pack(self, x):
        return super().pack(x).roll(1, 1)


FAULTS = {
    "ends_one_early": with_offsets(lambda o: [o[0], *(i - 1 for i in o[1:-1]), o[-1]]),
    "ends_one_late": with_offsets(lambda o: [o[0], *(i + 1 for i in o[1:-1]), o[-1]]),
    "mask_ignored": with_offsets(lambda o: [o[0], o[-1]]),
    "images_swapped": ImagesSwapped,
    "prefix_dropped": PrefixDropped,
    "prefix_turned": PrefixTurned,
    "padding_packed": PaddingPacked,
    "tokens_shifted": TokensShifted,
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(lively, monkeypatch, fault, gradients):
    """On the engine's way and on the ops'; with the sound packing the check passes."""
    model = build(lively, rope_type="axial", class_token=True, global_pool="token")
    ours = swapped(model)
    if gradients:
        monkeypatch.setattr(
            naflex, "run_packed_block", torch.enable_grad()(naflex.run_packed_block)
        )
    check(model, ours, batch_of())
    monkeypatch.setattr(naflex, "Packing", FAULTS[fault])
    with pytest.raises(AssertionError):
        check(model, ours, batch_of())
