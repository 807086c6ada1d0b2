"""The public names, on one screen; the package imports them when one is asked for."""

from featxfer.artifact import ArtifactError, Card, load_head, save_head
from featxfer.backbone import Backbone, Preprocessing
from featxfer.block import FeatureTransferBlock
from featxfer.checkpoint import CheckpointError, EpochLog
from featxfer.degrade import BaseDegradation, Degradation, ScaledDegradation
from featxfer.features import Features, extract_features, fill_stores
from featxfer.head import FeatureTransferHead
from featxfer.images import ImageError, Images, open_images
from featxfer.labels import (
    Clustering,
    LabelDiagnostics,
    assign,
    centroid_scores,
    diagnose,
    kmeans,
    pseudo_labels,
)
from featxfer.metrics import average_precision, confidence_interval, gap_recovered
from featxfer.objectives import (
    OBJECTIVES,
    InstanceContrast,
    LabelCrossEntropy,
    Objective,
    PairedRegression,
    PrototypeDistillation,
    make_objective,
)
from featxfer.pairs import PairAgreement, compare_pairs
from featxfer.recipe import BLOCK_RECIPE, FEATURES_RECIPE, Recipe
from featxfer.scaling import scale_features
from featxfer.store import FeatureStore, StoreError
from featxfer.svm import PROTOCOLS, LinearSVMs, Protocol, average_precisions, train_svms
from featxfer.trainer import (
    DivergenceError,
    PseudoLabelTrainer,
    fit_features_head,
    fit_head,
    warm_start_head,
)
from featxfer.unpaired import UNPAIRED, unpaired_targets
from featxfer.voc import DevkitError, VOCDevkit

__all__ = [
    "BLOCK_RECIPE",
    "FEATURES_RECIPE",
    "OBJECTIVES",
    "PROTOCOLS",
    "UNPAIRED",
    "ArtifactError",
    "Backbone",
    "BaseDegradation",
    "Card",
    "CheckpointError",
    "Clustering",
    "Degradation",
    "DevkitError",
    "DivergenceError",
    "EpochLog",
    "FeatureStore",
    "FeatureTransferBlock",
    "FeatureTransferHead",
    "Features",
    "ImageError",
    "Images",
    "InstanceContrast",
    "LabelCrossEntropy",
    "LabelDiagnostics",
    "LinearSVMs",
    "Objective",
    "PairAgreement",
    "PairedRegression",
    "Preprocessing",
    "Protocol",
    "PrototypeDistillation",
    "PseudoLabelTrainer",
    "Recipe",
    "ScaledDegradation",
    "StoreError",
    "VOCDevkit",
    "assign",
    "average_precision",
    "average_precisions",
    "centroid_scores",
    "compare_pairs",
    "confidence_interval",
    "diagnose",
    "extract_features",
    "fill_stores",
    "fit_features_head",
    "fit_head",
    "gap_recovered",
    "kmeans",
    "load_head",
    "make_objective",
    "open_images",
    "pseudo_labels",
    "save_head",
    "scale_features",
    "train_svms",
    "unpaired_targets",
    "warm_start_head",
]
