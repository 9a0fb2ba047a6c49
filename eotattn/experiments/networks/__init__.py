"""Networks of the experiments, one file a network."""

from eotattn.experiments.networks.attention_kinds import ATTENTION_KINDS, AttentionKind, DecoderConfig, display_name
from eotattn.experiments.networks.copy_reader import CopyReader, CopyReaderConfig
from eotattn.experiments.networks.decoder import Decoder
from eotattn.experiments.networks.vision import VisionConfig, VisionTransformer

__all__ = [
    "ATTENTION_KINDS",
    "AttentionKind",
    "CopyReader",
    "CopyReaderConfig",
    "Decoder",
    "DecoderConfig",
    "VisionConfig",
    "VisionTransformer",
    "display_name",
]
