from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from benchmarks.common import fit
from benchmarks.common.study import Study
from benchmarks.voc2007.sample_devkit import render_sample
from featxfer import Degradation, FeatureTransferHead, Recipe, VOCDevkit
from featxfer_integrations import FitOptions, attach_transfer, transfers_of


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> VOCDevkit:
    return VOCDevkit(render_sample(tmp_path_factory.mktemp("kit"), trainval=24, test=12))


@pytest.fixture
def study(devkit: VOCDevkit, tmp_path: Path) -> Study:
    torch.manual_seed(0)
    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), weights)
    resize = Degradation(hr_size=64, lr_size=16)
    return Study("timm/test_resnet", str(weights), devkit, tmp_path / "cache", resize)


SHORT = Recipe(epochs=2, batch_size=16, learning_rate=1e-2, optimizer="adamw")
OPTIONS = FitOptions(recipe=SHORT, clusters=4)


@pytest.mark.filterwarnings("ignore:the head does not help")
@pytest.mark.parametrize("output", ["features", "clusters"])
def test_a_fit_is_trained_once_and_then_read(
    study: Study, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> fit.Fit:
        head = FeatureTransferHead(96, 4, output=output)
        model = attach_transfer(study.copy(), head)
        return study.fit([study.resize], 0, model=model, options=OPTIONS)

    first, second = asked(), asked()
    found = first.run()
    assert found.seconds > 0
    assert found.blocks_seconds == 0
    assert len(found.self_check) == (output == "features")
    monkeypatch.setattr(fit, "fit_transfer", lambda *_, **__: pytest.fail("trained again"))
    assert second.run() == found
    one, two = (transfers_of(f.model).state_dict() for f in (first, second))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain = FeatureTransferHead(96, 4, output=output)
    assert not torch.equal(fit.head_of(second.model).fc2.weight, plain.fc2.weight)


def test_another_seed_or_split_is_another_fit(study: Study, devkit: VOCDevkit) -> None:
    keys = [study.fit([study.resize], seed, options=OPTIONS).key for seed in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]
    images = devkit.images("test")
    assert study.fit([study.resize], 0, images=images, options=OPTIONS).key not in keys


def test_images_of_both_splits_are_told(study: Study) -> None:
    with pytest.raises(ValueError, match=r"24 images of 'trainval' are in 'trainval' too, 000001"):
        Study(study.name, study.weights, study.devkit, study.cache, splits=("trainval", "trainval"))
