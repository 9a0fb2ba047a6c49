"""Networks of the experiments, one file a network."""

from eotattn.experiments.networks.copy_reader import CopyReader, CopyReaderConfig
from eotattn.experiments.networks.decoder import ATTENTION_KINDS, AttentionKind, Decoder, DecoderConfig

__all__ = ["ATTENTION_KINDS", "AttentionKind", "CopyReader", "CopyReaderConfig", "Decoder", "DecoderConfig"]
