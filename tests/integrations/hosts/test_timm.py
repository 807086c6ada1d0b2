"""timm: a model of nearly every family, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from featxfer_integrations import (
    AttachError,
    attach_transfer,
    detach_transfer,
)
from tests.integrations.hosts.contract import (
    Host,
    attributes,
    check_contract,
    fill_zeros,
    head_of,
    hooks,
    note_plain,
    randomise,
    run_with_input_of,
)

# Family (a file of timm/models): its smallest model, the side of its images, and what makes it
# smaller still. Convolutional models take small images; others have theirs, or `img_size`.
TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 64, {"img_size": 64, "depth": 1}),
    "byobnet": ("test_byobnet", 64, {}),
    "cait": ("cait_xxs24_224", 64, {"img_size": 64, "depth": 2}),
    "coat": ("coat_tiny", 64, {"img_size": 64}),
    "convit": ("convit_tiny", 64, {"img_size": 64}),
    "convmixer": ("convmixer_768_32", 64, {}),
    "convnext": ("test_convnext", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "csatv2": ("csatv2", 64, {}),
    "cspnet": ("cs3darknet_focus_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": ("davit_tiny", 64, {}),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"img_size": 56, "depth": 1}),
    "deit": ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64}),
    "densenet": ("densenet121", 64, {}),
    "dla": ("dla46x_c", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 64, {"img_size": 64}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 64, {"img_size": 64}),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
    "gemma4_vit": ("gemma4_vit_167m", 96, {"depth": 1}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64}),
    "hieradet_sam2": ("sam2_hiera_tiny", 128, {"stages": (1, 1, 1, 1), "global_att_blocks": ()}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "iformer": ("iformer_t", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_128s", 64, {"img_size": 64}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("test_mambaout", 64, {}),
    "maxxvit": ("test_coatnet", 64, {"img_size": 64}),
    "metaformer": ("poolformerv2_s12", 64, {}),
    "mlp_mixer": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv5": ("mobilenetv5_base", 64, {}),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": 64}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 64, {"depth": 1}),
    "nasnet": ("nasnetalarge", 96, {"num_features": 480}),
    "nest": ("nest_tiny", 64, {"img_size": 64}),
    "nextvit": ("nextvit_small", 64, {}),
    "nfnet": ("test_nfnet", 64, {}),
    "pit": ("pit_ti_distilled_224", 64, {"img_size": 64}),
    "pnasnet": ("pnasnet5large", 96, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"depth": 1}),
    "rdnet": ("rdnet_tiny", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m1", 64, {}),
    "resnet": ("test_resnet", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": ("sequencer2d_s", 64, {"img_size": 64}),
    "shvit": ("shvit_s1", 128, {}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 56, {"img_size": 56}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 64, {"img_size": 64}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, {"img_size": 64}),
    "tiny_vit": ("tiny_vit_5m_224", 64, {}),
    "tnt": ("tnt_s_patch16_224", 64, {"img_size": 64}),
    "tresnet": ("tresnet_m", 64, {}),
    "twins": ("twins_svt_small", 64, {"img_size": 64}),
    "vgg": ("vgg11", 64, {"mlp_ratio": 1 / 16}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64}),
    "vision_transformer": ("test_vit", 64, {"img_size": 64}),
    "vision_transformer_relpos": ("test_vit_relpos", 64, {"img_size": 64}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64, {"img_size": 64, "depth": 1}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "xception": ("legacy_xception", 96, {}),
    "xception_aligned": ("xception41p", 96, {}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"img_size": 64}),
}

TIMM_OF_SEVERAL_WIDTHS = ("crossvit_9_240", "efficientvim_m1")
TIMM_HEADLESS = (
    *("byobnet", "convnext", "deit", "efficientvit_mit", "efficientvit_msra", "levit"),
    *("mobilenetv3", "nfnet", "resnet", "shvit", "vision_transformer", "xcit"),
)


def timm_host(name: str, side: int = 64, **options: Any) -> Host:
    torch.manual_seed(0)
    model: Any = fill_zeros(timm.create_model(name, **options).eval())
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        maps = model.forward_features(images)

    def run() -> tuple[Tensor, ...]:
        pre_logits = model.forward_head(maps, pre_logits=True)
        if not model.num_classes:
            return model(images), pre_logits
        logits, seen = run_with_input_of(classifier_of(model), model, images)
        return logits, pre_logits, seen

    return Host(model, images, run)


def classifier_of(model: Any) -> nn.Module:
    """The first that timm tells of; of a whole head its layer."""
    found = model.get_classifier()
    first: nn.Module = found[0] if isinstance(found, tuple | list | nn.ModuleList) else found
    layer: nn.Module = getattr(first, "fc", first)
    return layer


def test_sixty_families() -> None:
    assert len({name for name, _, _ in TIMM.values()}) == len(TIMM) >= 60


@pytest.mark.parametrize("family", TIMM)
def test_timm(family: str) -> None:
    name, side, options = TIMM[family]
    host = timm_host(name, side, **options)
    assert type(host.model).__module__ == f"timm.models.{family}"
    check_contract(host)


@pytest.mark.parametrize("family", TIMM_HEADLESS)
def test_timm_headless(family: str) -> None:
    name, side, options = TIMM[family]
    check_contract(timm_host(name, side, **options, num_classes=0))


@pytest.mark.parametrize("family", TIMM_HEADLESS)
def test_timm_reset_classifier(family: str) -> None:
    """To other classes, then to none: the head stays, acts once, and is taken away as it came."""
    name, side, options = TIMM[family]
    host = timm_host(name, side, **options)
    model = host.model
    with torch.no_grad():
        plain = note_plain(host)
        attach_transfer(model, hidden_features=32)
        randomise(head_of(model))
        model.reset_classifier(7)
        logits, *features = host.run()
        assert logits.shape == (1, 7)
        for feature, before in zip(features, plain.outputs[1:], strict=True):
            assert torch.equal(feature, head_of(model)(before))
        model.reset_classifier(0)
        transferred = head_of(model)(plain.outputs[1])
        assert all(torch.equal(output, transferred) for output in host.run())
        detach_transfer(model)
        assert all(torch.equal(output, plain.outputs[1]) for output in host.run())
    assert attributes(model)[""] == plain.attributes[""]
    assert all(count == plain.hooks.get(name, 0) for name, count in hooks(model).items())


@pytest.mark.parametrize("name", TIMM_OF_SEVERAL_WIDTHS)
def test_classifiers_of_several_widths_are_refused(name: str) -> None:
    model = timm.create_model(name)
    names = attributes(model)
    with pytest.raises(AttachError, match=r"take features of several widths, .* one head fits one"):
        attach_transfer(model)
    assert attributes(model) == names
    assert not any(hooks(model).values())
