"""FeatureTransfer: the head as a scikit-learn transformer, for features that are arrays already.

Imported by its module only, `from featxfer.estimator import FeatureTransfer`: it needs
scikit-learn, which `import featxfer` does not load.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from featxfer.checks import check_integer
from featxfer.modules.head import FeatureTransferHead
from featxfer.training.heads import fit_features_head
from featxfer.training.pseudo_labels import Clustering, count_distinct, kmeans
from featxfer.training.recipe import Recipe

Rows = npt.NDArray[np.float32]


class FeatureTransfer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Moves LR features towards the HR features of the same images, without labels.

    `fit` clusters the directions of the HR rows with k-means and trains a `FeatureTransferHead`
    with output "features" by `fit_features_head` (ours, after Wu et al. 2019); `transform` applies
    it. Import it from here, `from featxfer.estimator import FeatureTransfer`: the package itself
    does not load scikit-learn.

    The HR rows are a parameter of `fit`. In a pipeline they are passed by the step's name and
    reach that step as they are, so this step comes first, before any scaling:

        pipeline = make_pipeline(FeatureTransfer(), StandardScaler(), LinearSVC())
        pipeline.fit(X_lr, y, featuretransfer__X_hr=X_hr)

    Without `X_hr` the rows of `X` stand for both sides. Generic scikit-learn code can call it so,
    but there is then nothing to transfer: the head learns to return what it gets.

    Args:
        n_clusters: most HR clusters k, >= 1; fewer where the HR rows have fewer directions.
        hidden_features: width of the hidden layer, >= 1.
        recipe: how it is trained; by default `featxfer.FEATURES_RECIPE`.
        random_state: of the clusters, the initial weights and the order of the rows: an int, a
            `RandomState`, or None for another result each time. No global random state is read or
            changed, NumPy's for None neither.

    Attributes:
        head_: the trained `FeatureTransferHead`, in eval mode; it can be saved and attached.
        log_: an `EpochLog` an epoch.
        clustering_: the `Clustering` of the directions of the HR rows.
        n_features_in_: width d of the features.
        feature_names_in_: names of the columns, where `X` had any.
    """

    head_: FeatureTransferHead

    def __init__(
        self,
        n_clusters: int = 100,
        hidden_features: int = 512,
        recipe: Recipe | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.hidden_features = hidden_features
        self.recipe = recipe
        self.random_state = random_state

    def fit(
        self, X: npt.ArrayLike, y: object = None, X_hr: npt.ArrayLike | None = None
    ) -> FeatureTransfer:
        """Trains the head, and returns the estimator.

        The same int `random_state`, rows, machine and thread count give the same head, bit for
        bit.

        Args:
            X: LR features `(n, d)`, n >= 2; taken as float32.
            y: not used.
            X_hr: HR features `(n, d)` of the same images; by default the rows of `X`.

        Raises:
            ValueError: a parameter or an array that cannot be used: other shapes, NaN or infinity,
                HR rows that are all equal.
            TypeError: a sparse array.
            DivergenceError: a loss that is not finite.
        """
        clusters = _as_integer("n_clusters", self.n_clusters)
        hidden = _as_integer("hidden_features", self.hidden_features)
        state = np.random.RandomState() if self.random_state is None else self.random_state
        seed = int(check_random_state(state).randint(2**31 - 1))
        X, X_hr = _as_array(X), None if X_hr is None else _as_array(X_hr)
        lr = validate_data(self, X, dtype=np.float32, force_writeable=True, ensure_min_samples=2)
        hr = lr if X_hr is None else _as_paired(X_hr, lr.shape)
        if (hr == hr[0]).all():
            name = "X" if X_hr is None else "X_hr"
            raise ValueError(f"{name}: got {len(hr)} equal rows, wanted features that vary")
        clustering = _cluster(_directions(hr), clusters, seed)
        head = FeatureTransferHead(lr.shape[1], clustering.k, hidden, seed=seed)
        self.log_ = fit_features_head(head, hr, [lr], clustering, recipe=self.recipe, seed=seed)
        self.clustering_ = clustering
        self.head_ = head.eval()
        return self

    def transform(self, X: npt.ArrayLike) -> Rows:
        """Transferred features, float32 `(n, d)`, of LR features `(n, d)`.

        The head runs in float64 here, so that a row's result does not depend on the rows beside
        it: in float32 the last bits would.

        Raises:
            NotFittedError: before `fit`.
            ValueError: another width or other column names, NaN or infinity.
        """
        check_is_fitted(self)
        X = _as_array(X)
        rows = validate_data(self, X, reset=False, dtype=np.float32, force_writeable=True)
        transferred: Rows = copy.deepcopy(self.head_).double().transfer(rows).numpy()
        return transferred

    @property
    def _n_features_out(self) -> int:
        return int(self.n_features_in_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _as_integer(name: str, value: Any) -> int:
    """The int >= 1 that `value` is; a NumPy integer, as from a parameter grid, is one."""
    if isinstance(value, np.integer):
        value = int(value)
    check_integer(name, value, at_least=1)
    return int(value)


def _as_array(X: npt.ArrayLike) -> npt.ArrayLike:
    """What scikit-learn takes: of a tensor its values, whatever its dtype, device or gradient."""
    return X.detach().float().cpu().numpy() if isinstance(X, Tensor) else X


def _as_paired(X_hr: npt.ArrayLike, shape: tuple[int, ...]) -> Rows:
    """HR rows as finite float32; raises `ValueError` for a shape that is not the LR rows'."""
    if np.shape(X_hr) != shape:
        raise ValueError(
            f"X_hr: got shape {np.shape(X_hr)}, wanted {shape}, an HR row for each row of X"
        )
    hr: Rows = check_array(X_hr, dtype=np.float32, force_writeable=True, input_name="X_hr")
    return hr


def _directions(rows: Rows) -> Rows:
    """Rows divided by their L2 norm, without those of zeros, which have no direction."""
    wide = rows[rows.any(axis=1)].astype(np.float64)
    unit: Rows = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _cluster(directions: Rows, n_clusters: int, seed: int) -> Clustering:
    """K-means with at most a cluster for each distinct row, and no centroid of zero.

    Opposite rows may cancel out. Such a centroid has no direction, and all rows are equally near:
    the first row takes its place.
    """
    distinct = count_distinct(torch.from_numpy(directions), n_clusters)
    clustering = kmeans(directions, distinct, seed=seed)
    centroids = clustering.centroids.clone()
    centroids[~centroids.any(dim=1)] = centroids.new_tensor(directions[0])
    return dataclasses.replace(clustering, centroids=centroids)
