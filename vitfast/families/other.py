"""Transformers whose blocks are not implemented yet.

Their plain parts (LayerNorm, Mlp, LayerScale, PatchEmbed) are the ones that other families swap.
"""

from vitfast.families._family import Family, Gap, attentions, blocks

_BLOCKS = {
    "cait": ("LayerScaleBlock", "LayerScaleBlockClassAttn"),
    "coat": ("SerialBlock", "ParallelBlock"),
    "convit": ("Block",),
    "crossvit": ("MultiScaleBlock", "CrossAttentionBlock"),
    "deepseek_vit": ("DeepseekVitBlock",),
    "efficientformer": ("MetaBlock1d", "MetaBlock2d"),
    "efficientvit_msra": ("EfficientVitBlock",),
    "focalnet": ("FocalNetBlock",),
    "gcvit": ("GlobalContextVitBlock",),
    "gemma4_vit": ("Gemma4Block",),
    "hieradet_sam2": ("MultiScaleBlock",),
    "levit": ("LevitBlock",),
    "mlp_mixer": ("MixerBlock", "ResBlock", "SpatialGatingBlock"),
    "mobilevit": ("MobileVitBlock", "LinearTransformerBlock", "MobileVitV2Block"),
    "mvitv2": ("MultiScaleBlock",),
    "nextvit": ("NextConvBlock", "NextTransformerBlock"),
    "pvt_v2": ("Block",),
    "tiny_vit": ("TinyVitBlock",),
    "tnt": ("Block",),
    "twins": ("Block",),
    "vision_transformer_sam": ("Block",),
    "visformer": ("Block",),
    "vitamin": ("MbConvLNBlock",),
    "volo": ("Transformer", "Outlooker", "ClassBlock"),
    "xcit": ("XCABlock", "ClassAttentionBlock"),
}
_ATTENTIONS = {
    "cait": ("ClassAttn", "TalkingHeadAttn"),
    "crossvit": ("CrossAttention",),
    "gcvit": ("WindowAttentionGlobal",),
    "gemma4_vit": ("Gemma4Attention",),
    "hieradet_sam2": ("MultiScaleAttention",),
    "mvitv2": ("MultiScaleAttention", "MultiScaleAttentionPoolFirst"),
    "nest": ("Attention",),
    "pvt_v2": ("Attention",),
    "tiny_vit": ("Attention",),
    "vision_transformer_sam": ("Attention",),
    "volo": ("Attention", "OutlookAttention", "ClassAttention"),
    "xcit": ("XCA",),
}
_NCHW_NORMS = ("LayerNorm2dFp32", "SimpleNorm2d")

FAMILY = Family(
    name="other",
    models=(),
    sample="",
    gaps=(
        *(gap for file, names in _BLOCKS.items() for gap in blocks(f"timm.models.{file}", *names)),
        *(
            gap
            for file, names in _ATTENTIONS.items()
            for gap in attentions(f"timm.models.{file}", *names)
        ),
        *(
            Gap(f"timm.layers.{name}", "norm over NCHW: not implemented yet")
            for name in _NCHW_NORMS
        ),
    ),
)
