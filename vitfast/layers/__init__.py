"""Drop-in layers: each subclasses one timm class and overrides `forward` only.

Constructors, parameters and `state_dict` are timm's. `vitfast.swap` puts them into a model; they
can also be built directly, and given to timm's own factories (`block_fn=vitfast.layers.Block`).
What a layer cannot do fused runs timm's forward.
"""

from vitfast.layers.attention import Attention, AttentionRope
from vitfast.layers.base import Layer
from vitfast.layers.beit import Attention as BeitAttention
from vitfast.layers.beit import Block as BeitBlock
from vitfast.layers.block import Block
from vitfast.layers.convnext import ConvNeXtBlock
from vitfast.layers.davit import SpatialBlock as DavitSpatialBlock
from vitfast.layers.davit import WindowAttention as DavitWindowAttention
from vitfast.layers.edgenext import ConvBlock as EdgeNeXtConvBlock
from vitfast.layers.eva import EvaAttention, EvaBlock
from vitfast.layers.hiera import HieraBlock
from vitfast.layers.hiera import MaskUnitAttention as HieraMaskUnitAttention
from vitfast.layers.hybrid import HybridEmbed
from vitfast.layers.inception_next import MetaNeXtBlock as InceptionNeXtBlock
from vitfast.layers.layer_scale import LayerScale
from vitfast.layers.maxvit import AttentionCl as MaxxVitAttentionCl
from vitfast.layers.maxvit import ConvNeXtBlock as MaxxVitConvNeXtBlock
from vitfast.layers.maxvit import PartitionAttentionCl as MaxxVitPartitionAttentionCl
from vitfast.layers.metaformer import Attention as MetaFormerAttention
from vitfast.layers.metaformer import Downsampling as MetaFormerDownsampling
from vitfast.layers.metaformer import LayerNorm2dNoBias as MetaFormerLayerNorm2dNoBias
from vitfast.layers.metaformer import LayerNormNoBias as MetaFormerLayerNormNoBias
from vitfast.layers.metaformer import MetaFormerBlock
from vitfast.layers.mlp import GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from vitfast.layers.naflex import NaFlexVit
from vitfast.layers.norm import GlobalResponseNorm, LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d
from vitfast.layers.patch_embed import PatchEmbed
from vitfast.layers.rdnet import Block as RDNetBlock
from vitfast.layers.rdnet import BlockESE as RDNetBlockESE
from vitfast.layers.relpos import RelPosAttention, RelPosBlock
from vitfast.layers.resnetv2 import Bottleneck as ResNetV2Bottleneck
from vitfast.layers.resnetv2 import PreActBottleneck as ResNetV2PreActBottleneck
from vitfast.layers.sequential import Sequential
from vitfast.layers.stage import ConvNeXtStage, SwinTransformerStage, SwinTransformerV2Stage
from vitfast.layers.std_conv import GroupNorm1Act, GroupNormAct, StdConv2d, StdConv2dSame
from vitfast.layers.swin import PatchMerging as SwinPatchMerging
from vitfast.layers.swin import SwinTransformerBlock
from vitfast.layers.swin import WindowAttention as SwinWindowAttention
from vitfast.layers.swin_v2 import PatchMerging as SwinV2PatchMerging
from vitfast.layers.swin_v2 import SwinTransformerV2Block
from vitfast.layers.swin_v2 import WindowAttention as SwinV2WindowAttention
from vitfast.layers.swin_v2_cr import PatchMerging as SwinV2CrPatchMerging
from vitfast.layers.swin_v2_cr import SwinTransformerV2CrBlock
from vitfast.layers.swin_v2_cr import WindowMultiHeadAttention as SwinV2CrWindowAttention
from vitfast.layers.torch_norm import LayerNorm as TorchLayerNorm

__all__ = [
    "Attention",
    "AttentionRope",
    "BeitAttention",
    "BeitBlock",
    "Block",
    "ConvNeXtBlock",
    "ConvNeXtStage",
    "DavitSpatialBlock",
    "DavitWindowAttention",
    "EdgeNeXtConvBlock",
    "EvaAttention",
    "EvaBlock",
    "GlobalResponseNorm",
    "GlobalResponseNormMlp",
    "GluMlp",
    "GroupNorm1Act",
    "GroupNormAct",
    "HieraBlock",
    "HieraMaskUnitAttention",
    "HybridEmbed",
    "InceptionNeXtBlock",
    "Layer",
    "LayerNorm",
    "LayerNorm2d",
    "LayerScale",
    "MaxxVitAttentionCl",
    "MaxxVitConvNeXtBlock",
    "MaxxVitPartitionAttentionCl",
    "MetaFormerAttention",
    "MetaFormerBlock",
    "MetaFormerDownsampling",
    "MetaFormerLayerNorm2dNoBias",
    "MetaFormerLayerNormNoBias",
    "Mlp",
    "NaFlexVit",
    "PatchEmbed",
    "RDNetBlock",
    "RDNetBlockESE",
    "RelPosAttention",
    "RelPosBlock",
    "ResNetV2Bottleneck",
    "ResNetV2PreActBottleneck",
    "RmsNorm",
    "RmsNorm2d",
    "Sequential",
    "StdConv2d",
    "StdConv2dSame",
    "SwiGLU",
    "SwinPatchMerging",
    "SwinTransformerBlock",
    "SwinTransformerStage",
    "SwinTransformerV2Block",
    "SwinTransformerV2CrBlock",
    "SwinTransformerV2Stage",
    "SwinV2CrPatchMerging",
    "SwinV2CrWindowAttention",
    "SwinV2PatchMerging",
    "SwinV2WindowAttention",
    "SwinWindowAttention",
    "TorchLayerNorm",
]
