"""Integrations: attach to models of other libraries. Importing this room imports none of them."""

from eotattn.integrations.attachment import Attached, attach
from eotattn.integrations.capture import Capture, capture
from eotattn.integrations.head_interventions import AddPrior, AddSink, HideKey, ReplaceHeads, intervene
from eotattn.integrations.intervention_report import InterventionReport, PairedMean
from eotattn.integrations.maps import map_statistics, read_maps
from eotattn.integrations.prior_files import load_prior, save_prior
from eotattn.integrations.prior_interface import register_attention
from eotattn.integrations.training_probe import TrainingProbe

__all__ = [
    "AddPrior",
    "AddSink",
    "Attached",
    "Capture",
    "HideKey",
    "InterventionReport",
    "PairedMean",
    "ReplaceHeads",
    "TrainingProbe",
    "attach",
    "capture",
    "intervene",
    "load_prior",
    "map_statistics",
    "read_maps",
    "register_attention",
    "save_prior",
]
