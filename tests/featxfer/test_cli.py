from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

from featxfer import Degradation, FeatureTransferHead, open_images
from featxfer.cli import main
from featxfer.features.store import FeatureStore
from featxfer.modules.scaling import scale_features
from featxfer_integrations import attach_transfer, backbone_of


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def stores(image_folder: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """HR and LR stores of ten images, by the extract command of the integrations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun
    torch.manual_seed(0)
    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), weights)
    output = run(
        "extract", image_folder, "--backbone", "timm/test_resnet", "--weights", weights,
        "--part-rows", "4", "--cache", tmp_path / "cache",
    )  # fmt: skip
    lines = output.splitlines()
    assert lines[0] == "10 images, 96 features"
    yield Path(lines[1]), Path(lines[2])
    torch.set_num_threads(threads)


def test_extract_under_torchrun(
    stores: tuple[Path, Path], image_folder: Path, tmp_path: Path
) -> None:
    """Two processes, three parts of ten images: each fills its own of the same stores."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "featxfer.cli", "extract", image_folder, "--backbone", "timm/test_resnet",
        "--weights", tmp_path / "w.safetensors", "--part-rows", "4", "--cache", tmp_path / "two",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=True
    )
    for alone in stores:
        together = tmp_path / "two" / alone.name
        for rank in range(2):
            assert f"process {rank}: {together}, " in done.stdout
        rows, wanted = (FeatureStore.open(folder).read() for folder in (together, alone))
        assert rows.ids == wanted.ids
        assert torch.equal(rows.features, wanted.features)


def test_views_are_of_the_size_that_the_weights_are_for_unless_told(
    stores: tuple[Path, Path], image_folder: Path, tmp_path: Path
) -> None:
    extract: list[str | Path] = [
        "extract", image_folder, "--backbone", "timm/test_resnet", "--weights",
        tmp_path / "w.safetensors", "--cache", tmp_path / "other", "--hr-size",
    ]  # fmt: skip
    told = Path(run(*extract, "96").splitlines()[1])
    sizes = [FeatureStore.open(folder).manifest.view["hr_size"] for folder in (*stores, told)]
    assert sizes == [160, 160, 96]
    assert "hr_size: got 0, wanted an int >= 1" in run(*extract, "0", code=1)


def test_extract_tells_what_it_skips_in_one_line(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "03.jpg").write_bytes(b"no image")
    output = run(
        "extract", image_folder, "--backbone", "timm/test_resnet", "--weights", "random",
        "--cache", tmp_path / "cache", "--on-error", "skip",
    )  # fmt: skip
    (path,) = tmp_path.rglob("skipped.json")
    said = f"featxfer: 1 of 10 images could not be read and are left out, see {path}"
    assert [line for line in output.splitlines() if "could not be read" in line] == [said]
    assert "03.jpg cannot be read" in json.loads(path.read_text())["03.jpg"]
    assert "9 images, 96 features" in output


def test_extract_fit_and_show(stores: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "head"
    output = run("fit", *stores, "--clusters", "3", "--hidden", "8", "--out", out)
    assert '"agreement"' in output
    assert f"Wrote {out}" in output
    card = json.loads(run("show", out))
    assert card["head"]["in_features"] == 96
    assert card["degradations"][0]["lr_size"] == 32
    assert card["backbone"] == "timm/test_resnet"


@pytest.mark.parametrize("scaling", ["l2", "none"])
def test_an_attached_head_sees_what_it_was_fitted_on(
    image_folder: Path, tmp_path: Path, scaling: str
) -> None:
    torch.manual_seed(0)
    model, weights = timm.create_model("test_resnet").eval(), tmp_path / "w.safetensors"
    safetensors.torch.save_file(model.state_dict(), weights)
    output = run(
        "extract", image_folder, "--backbone", "timm/test_resnet", "--weights", weights,
        "--precision", "fp32", "--cache", tmp_path / "cache",
    )  # fmt: skip
    stores, out = [Path(line) for line in output.splitlines()[1:3]], tmp_path / "head"
    options = ["--clusters", "3", "--hidden", "8", "--labels", "paired", "--scaling", scaling]
    run("fit", *stores, *options, "--out", out)
    head = FeatureTransferHead.from_pretrained(out)
    assert head.scaling == scaling
    fitted_on = scale_features(FeatureStore.open(stores[1]).read().features, scaling)
    plain = FeatureTransferHead(**{**head.config, "scaling": "none"})
    plain.load_state_dict(head.state_dict())
    wanted = plain.transfer(fitted_on)
    torch.testing.assert_close(fitted_on.mean(0), head.input_mean, rtol=1e-4, atol=1e-5)

    preprocessing = backbone_of(model).preprocessing
    images, degradation = open_images(image_folder), Degradation(hr_size=160)
    views = torch.stack([degradation.lr(images.read(i)) for i in range(len(images))])
    attach_transfer(model, head=out)
    with torch.no_grad():
        logits = model(preprocessing(views))
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits.argmax(1), wanted.argmax(1))
    assert len(set(wanted.argmax(1).tolist())) > 1


def test_what_fit_cannot_use_is_told_before_clusters_are_sought(
    stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featxfer.kmeans", None)
    for name, value in (("--labels", "both"), ("--scaling", "max"), ("--hidden", "0")):
        output = run("fit", *stores, name, value, "--out", tmp_path / "head", code=1)
        assert f"got {value!r}, wanted" in output or "got 0, wanted" in output


def test_cache_list_and_verify(stores: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("cache", "list", tmp_path / "cache").count("10 images  3 of 3 parts") == 2
    assert "2 stores, 0 damaged files" in run("cache", "verify", tmp_path / "cache")
    part = next(stores[0].glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    (stores[1] / "manifest.json").write_text("{}")
    assert f"damaged: {part}" in run("cache", "verify", tmp_path / "cache", code=1)
    assert "manifest.json" in run("cache", "verify", tmp_path / "cache", code=1)


def test_fit_takes_an_hr_and_an_lr_store_of_one_setting(
    stores: tuple[Path, Path], tmp_path: Path
) -> None:
    hr, lr = stores
    out = ["--clusters", "3", "--out", str(tmp_path / "head")]
    assert "got stores of views ['lr', 'lr']" in run("fit", lr, lr, *out, code=1)
    assert "got stores of views ['lr', 'hr']" in run("fit", lr, hr, *out, code=1)
    weights = tmp_path / "other.safetensors"
    torch.manual_seed(1)
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), weights)
    output = run(
        "extract", tmp_path / "images", "--backbone", "timm/test_resnet", "--weights", weights,
        "--cache", tmp_path / "cache",
    )  # fmt: skip
    other = output.splitlines()[1]
    assert "got stores that differ in weights_sha256" in run("fit", other, lr, *out, code=1)
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_told(
    image_folder: Path, tmp_path: Path, device: str
) -> None:
    output = run(
        "extract", image_folder, "--backbone", "timm/test_resnet", "--weights", "random",
        "--cache", tmp_path / "cache", "--device", device, code=1,
    )  # fmt: skip
    assert f"Error: device: got '{device}', wanted 'auto' or one that torch can use" in output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_env_names_the_versions() -> None:
    assert f"torch {torch.__version__.split('+')[0]}" in run("env")


def test_errors_are_one_line(stores: tuple[Path, Path], tmp_path: Path) -> None:
    output = run("fit", *stores, "--clusters", "99", "--out", tmp_path / "head", code=1)
    assert output == "Error: k: got 99 clusters for 10 features, wanted at most 10\n"
    assert not (tmp_path / "head").exists()
    assert "Error: head: no card.json in" in run("show", tmp_path / "none", code=1)
    assert "is not a folder" in run("cache", "verify", tmp_path / "none", code=1)
