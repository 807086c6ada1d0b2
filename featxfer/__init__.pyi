"""featxfer: label-free transfer of high-resolution features to low-resolution images."""

from featxfer.evaluation.coco import open_coco
from featxfer.evaluation.metrics import average_precision, gap_recovered
from featxfer.evaluation.pairs import compare_pairs
from featxfer.evaluation.protocols import PROTOCOLS, Protocol
from featxfer.evaluation.svm import train_svms
from featxfer.evaluation.voc import VOCDevkit
from featxfer.features.backbone import Backbone, Preprocessing
from featxfer.features.extract import Features, extract_features, fill_stores
from featxfer.modules.artifact import ArtifactError, load_head, save_head
from featxfer.modules.base import Card
from featxfer.modules.block import FeatureTransferBlock
from featxfer.modules.head import FeatureTransferHead
from featxfer.training.heads import fit_features_head, fit_head
from featxfer.training.objectives import OBJECTIVES
from featxfer.training.pseudo_labels import Clustering, assign, diagnose, kmeans, pseudo_labels
from featxfer.training.recipe import BLOCK_RECIPE, FEATURES_RECIPE, Recipe
from featxfer.training.state import EpochLog
from featxfer.training.trainer import DivergenceError, PseudoLabelTrainer
from featxfer.views.decode import ImageError
from featxfer.views.degradation import BaseDegradation, Degradation, ScaledDegradation
from featxfer.views.images import Images, open_images

__all__ = [
    "BLOCK_RECIPE",
    "FEATURES_RECIPE",
    "OBJECTIVES",
    "PROTOCOLS",
    "ArtifactError",
    "Backbone",
    "BaseDegradation",
    "Card",
    "Clustering",
    "Degradation",
    "DivergenceError",
    "EpochLog",
    "FeatureTransferBlock",
    "FeatureTransferHead",
    "Features",
    "ImageError",
    "Images",
    "Preprocessing",
    "Protocol",
    "PseudoLabelTrainer",
    "Recipe",
    "ScaledDegradation",
    "VOCDevkit",
    "assign",
    "average_precision",
    "compare_pairs",
    "diagnose",
    "extract_features",
    "fill_stores",
    "fit_features_head",
    "fit_head",
    "gap_recovered",
    "kmeans",
    "load_head",
    "open_coco",
    "open_images",
    "pseudo_labels",
    "save_head",
    "train_svms",
]
__version__: str
