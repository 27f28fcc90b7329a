"""`split`: one optimizer with two rules, made from what a model says of its parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import GPT, Mixture, ResNet, VisionTransformer
from rules import assert_same, flat, numbers
from torch import nn

import steprule
from steprule import AdamW, Lion, Muon


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)


class Language(nn.Module):
    """The shape of a GPT: embeddings, blocks, and an output layer that may be an embedding's weight."""

    def __init__(self, tied: bool, width: int = 8):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, width), nn.Embedding(5, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def divided(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    """The names in each group."""
    optimizer = split(model, **options)
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


def split(model: nn.Module, **options: Any) -> Any:
    given: dict[str, Any] = {"matrix": (Muon, {"lr": 0.02}), "rest": (AdamW, {"lr": 3e-4})}
    return steprule.split(model, **{**given, "verbose": False, **options})


OF_BLOCKS = ["attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_is_divided(tied: bool) -> None:
    groups = divided(Language(tied))
    assert groups["matrix"] == [f"blocks.{i}.{x}" for i in range(2) for x in OF_BLOCKS]
    every = [name for name, _ in Language(tied).named_parameters()]
    assert sorted(groups["rest"]) == sorted(set(every) - set(groups["matrix"]))
    assert ("head.weight" in groups["rest"]) is not tied


def test_the_groups_are_those_that_a_user_would_write() -> None:
    model, same = Language(True), Language(True)
    same.load_state_dict(model.state_dict())
    optimizer = split(model, rest=(AdamW, {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}))
    matrix, rest = optimizer.param_groups
    assert (matrix["name"], matrix["rule"], matrix["lr"]) == ("matrix", "Muon", 0.02)
    assert (rest["name"], rest["rule"], rest["betas"], rest["weight_decay"]) == (
        "rest",
        "AdamW",
        (0.9, 0.95),
        0.0,
    )
    own = dict(same.named_parameters())
    by_hand = AdamW(
        [
            {
                "params": [(n, own[n]) for n in matrix["param_names"]],
                "rule": Muon,
                "lr": 0.02,
                "views": matrix["views"],
            },
            {"params": [(n, own[n]) for n in rest["param_names"]], "betas": (0.9, 0.95), "weight_decay": 0.0},
        ],
        lr=3e-4,
    )
    for x in (optimizer, by_hand):
        for step in range(2):
            for place, param in enumerate(flat(x)):
                param.grad = numbers(tuple(param.shape), param.dtype, seed=100 * step + place)
            x.step()
    assert_same([p.detach() for p in flat(optimizer)], [p.detach() for p in flat(by_hand)])
    by_hand.load_state_dict(optimizer.state_dict())


MLP = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("model", "matrix"),
    [
        (MLP, ["0.weight", "2.weight"]),
        (nn.Linear(4, 2), ["weight"]),
        (nn.DataParallel(MLP), ["module.0.weight", "module.2.weight"]),
        (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 8), nn.Linear(8, 2)), ["1.weight"]),
    ],
)
def test_other_models_are_divided(model: nn.Module, matrix: list[str]) -> None:
    groups = divided(model)
    assert groups["matrix"] == matrix
    assert sorted(name for names in groups.values() for name in names) == sorted(
        name for name, _ in model.named_parameters()
    )


class Raw(nn.Module):
    """A module whose weight may be anything."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


def test_a_rule_that_is_given_views_names_split() -> None:
    options: Any = {"views": {"0.weight": {"split": 2}}}
    with pytest.raises(TypeError, match=r"no hyper-parameter 'views'\. Give views=… to steprule\.split\.$"):
        Muon(nn.Linear(4, 4), **options)


def test_a_model_that_is_not_understood_is_refused_until_the_user_says() -> None:
    model = nn.Sequential(Raw(8, 3, 9), nn.Linear(8, 8), nn.Linear(8, 10))
    with pytest.raises(ValueError, match=r"only 64 of 378 weights .*where=\{.*: 0\.weight\."):
        divided(model)
    assert divided(model, where={"0.*": "rest"})["matrix"] == ["1.weight"]
    with pytest.raises(ValueError, match=r"Muon only supports 2D parameters, but '0\.weight'"):
        divided(model, where={"0.weight": "matrix"})
    seen = {"0.weight": {"flatten": True}}
    assert divided(model, where={"0.weight": "matrix"}, views=seen)["matrix"] == ["0.weight", "1.weight"]
    assert "0.weight" in divided(model, where={"0.weight": "matrix"}, matrix=(Lion, {}))["matrix"]


def test_frozen_parameters_are_left_out() -> None:
    model = Language(True)
    model.blocks[0].requires_grad_(False)
    groups = divided(model, where={"blocks.0.*": "rest"})
    assert not any(name.startswith("blocks.0.") for names in groups.values() for name in names)
    with pytest.raises(ValueError, match="is everything frozen"):
        divided(model.requires_grad_(False))


def test_patterns_decide_in_order() -> None:
    groups = divided(Language(False), where={"head.weight": "matrix", "blocks.1.*": "rest", "*.up.*": "rest"})
    assert groups["matrix"] == [*(f"blocks.0.{x}" for x in OF_BLOCKS if x != "up.weight"), "head.weight"]
    assert list(divided(Language(True), where={"*": "rest"})) == ["rest"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"where": {"block.*": "rest"}},
            ValueError,
            r"no parameter matches 'block\.\*'\. Did you mean 'blocks\.\*' or .*\? There are: tokens",
        ),
        ({"where": {"blocks.*": "muon"}}, ValueError, r"where\['blocks\.\*'\] = 'muon', must be 'matrix' or"),
        (
            {"where": {"blocks.*": "rest", "blocks.1.*": "matrix"}},
            ValueError,
            r"'blocks\.1\.\*' decides nothing, because 'blocks\.\*' comes first",
        ),
        ({"matrix": Muon}, TypeError, "must be a rule and a dict"),
        ({"matrix": ("muon", {})}, TypeError, "must be a rule and a dict"),
        ({"rest": (steprule.LBFGS, {})}, TypeError, "must be a rule and a dict"),
        ({"rest": (torch.optim.AdamW, {})}, TypeError, "must be a rule and a dict"),
        ({"rest": (AdamW, {"params": []})}, ValueError, "rest has 'params', which split decides"),
        ({"rest": (AdamW, {"lrr": 1e-3})}, ValueError, "AdamW has no hyper-parameter 'lrr'"),
        ({"rest": (steprule.Sophia, {})}, TypeError, "needs update_hessian"),
    ],
)
def test_what_split_refuses(
    options: dict[str, Any], error: type[Exception], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=message):
        split(Language(True), verbose=True, **options)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "given", [lambda: list(MLP.parameters()), lambda: MLP.named_parameters(), lambda: None]
)
def test_tensors_alone_do_not_say_what_they_are(given: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"split: got \w+, must be an nn\.Module"):
        split(given())


def test_the_table_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    split(Language(True), where={"blocks.1.down.weight": "rest"}, verbose=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {line[0]: line for line in lines}
    assert found["parameter"][1:] == ["shape", "rule", "reason"]
    assert found["tokens.weight"][1:4] == ["(11,", "8)", "AdamW"]
    assert " ".join(found["tokens.weight"][4:]) == "an embedding, shared with another layer"
    assert " ".join(found["norm.weight"][2:]) == "AdamW of a normalization"
    assert found["blocks.0.up.weight"][3] == "Muon"
    assert " ".join(found["blocks.1.down.weight"][3:]) == "AdamW matches 'blocks.1.down.weight'"
    split(Language(True))
    assert not capsys.readouterr().out


def test_a_lazy_model_is_divided_before_it_has_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.LazyLinear(4), nn.LazyLinear(2))

    model = fresh()
    optimizer = split(model, verbose=True)
    assert "no shape yet" in capsys.readouterr().out
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "2.weight"]
    for _ in range(2):
        model(numbers((8, 5), torch.float32, 1)).square().sum().backward()
        optimizer.step()
    again = fresh()
    resumed = split(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    assert steprule.explain(resumed)
    filters = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(4), nn.Linear(4, 4))
    optimizer = split(filters)
    filters(numbers((2, 3, 5, 5), torch.float32, 1)).square().sum().backward()
    before = filters[0].weight.detach().clone()
    optimizer.step()
    assert not filters[0].weight.equal(before)


def test_modifiers_of_both_parts() -> None:
    clip = steprule.GlobalNormClip(1.0)
    optimizer = split(
        Language(True),
        matrix=(Muon, {"lr": 0.02, "modifiers": [clip]}),
        rest=(AdamW, {"modifiers": [clip, steprule.EMA(0.9)]}),
    )
    for place, param in enumerate(flat(optimizer)):
        param.grad = numbers(tuple(param.shape), param.dtype, seed=place)
    optimizer.step()
    whole = torch.cat([p.grad.flatten().double() for p in flat(optimizer)]).norm()
    assert optimizer.gradient_norm == pytest.approx(float(whole), rel=1e-9)
    assert [group["modifiers"] for group in optimizer.param_groups] == [
        ("global_norm_clip",),
        ("global_norm_clip", "ema"),
    ]
    # Only the groups with an average have other weights to evaluate with.
    before = [p.detach().clone() for p in flat(optimizer)]
    with optimizer.averaged_weights():
        count = len(optimizer.param_groups[0]["params"])
        assert_same([p.detach() for p in flat(optimizer)[:count]], before[:count])
    assert_same([p.detach() for p in flat(optimizer)], before)


def reasons(model: nn.Module, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, tuple[str, str]]:
    """The rule and the reason of each parameter, as printed."""
    split(model, verbose=True, **options)
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    return {name: (rule, reason) for name, _, rule, reason in lines}


def test_the_reasons_of_a_residual_network(capsys: pytest.CaptureFixture[str]) -> None:
    found = reasons(ResNet(), capsys, where={"conv1.weight": "rest"})
    assert found["conv1.weight"] == ("AdamW", "matches 'conv1.weight'")
    assert found["layer1.0.conv1.weight"] == ("Muon", "a convolution (flattened)")
    assert found["layer1.0.conv2.weight"] == ("AdamW", "a depthwise convolution")
    found = reasons(ResNet(), capsys, matrix=(Lion, {}))
    assert found["conv1.weight"] == ("Lion", "a convolution")
    assert found["layer1.0.downsample.0.weight"] == ("Lion", "a convolution")
    assert found["layer1.0.conv2.weight"] == ("AdamW", "a depthwise convolution")
    assert found["layer1.0.bn2.weight"] == ("AdamW", "of a normalization")
    assert found["layer1.0.downsample.0.bias"] == ("AdamW", "a bias")
    assert found["fc.weight"] == ("AdamW", "the output layer: the last Linear of the model")


def test_the_reasons_of_a_vision_transformer(capsys: pytest.CaptureFixture[str]) -> None:
    found = reasons(VisionTransformer(), capsys)
    same = "pos_embed of VisionTransformer, the same for every example: its first dimension is 1"
    assert found["pos_embed"] == ("AdamW", same)
    assert found["cls_token"] == ("AdamW", "cls_token of VisionTransformer, a vector")
    assert found["patch_embed.proj.weight"] == ("Muon", "a convolution (flattened)")
    assert found["blocks.0.ls1"] == ("AdamW", "a vector")
    three = "a projection of attention (3 matrices side by side along the rows)"
    assert found["blocks.2.attn.in_proj_weight"] == ("Muon", three)
    assert found["blocks.2.mlp.fc2.weight"] == ("Muon", "the weight of a Linear layer")
    assert found["head.weight"] == ("AdamW", "the output layer: the last Linear of the model")
    # Without an output layer, the last Linear is a hidden one.
    model = VisionTransformer()
    model.head = nn.Identity()
    assert reasons(model, capsys)["blocks.2.mlp.fc2.weight"] == ("Muon", "the weight of a Linear layer")


def test_the_reasons_of_a_language_model_and_a_mixture_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    found = reasons(GPT(), capsys)
    assert found["transformer.wte.weight"] == ("AdamW", "an embedding, shared with another layer")
    assert found["transformer.h.1.mlp.fc2.weight"] == ("Muon", "the weight of a Linear layer")
    found = reasons(Mixture(), capsys)
    assert found["layers.1.moe.gate.weight"] == ("AdamW", "a router: one row for each of 5 experts")
    assert found["layers.1.moe.experts.4.fc1.weight"] == ("Muon", "the weight of a Linear layer")
    assert found["head.weight"] == ("AdamW", "the output layer: the last Linear of the model")


class Own(nn.Module):
    """A module of the user's."""


class RawExperts(nn.Module):
    """All experts in one tensor, and a router with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Own()
        self.router.weight = nn.Parameter(torch.ones(3, 8))
        self.router.bias = nn.Parameter(torch.ones(3))
        self.experts = Own()
        self.experts.activation = nn.ReLU()
        self.experts.up = nn.Parameter(torch.ones(3, 8, 2))
        self.experts.down_bias = nn.Parameter(torch.ones(3, 8))


def test_experts_in_one_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), Block(8), RawExperts(), nn.Linear(8, 9))
    found = reasons(model, capsys)
    assert found["2.router.weight"] == ("AdamW", "a router: one row for each of 3 experts")
    assert found["2.experts.up"] == ("Muon", "the matrices of 3 experts")
    assert found["2.experts.down_bias"] == ("AdamW", "a bias")
    assert reasons(model, capsys, matrix=(Lion, {}))["2.experts.up"] == ("Lion", "the matrices of 3 experts")
    assert found["3.weight"] == ("AdamW", "the output layer: the last Linear of the model")


def test_grouped_convolutions_are_several_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 8, 3), nn.Linear(8, 64), nn.Linear(64, 8))
    found = reasons(model, capsys, matrix=(Lion, {}))
    # A filter for each channel beside a Linear layer with as many outputs is no expert.
    assert found["3.weight"] == ("AdamW", "the output layer: the last Linear of the model")
    mixer = nn.ModuleDict({"conv": nn.Conv1d(6, 6, 3, groups=6), "dt": nn.Linear(2, 6)})
    assert reasons(nn.Sequential(mixer, nn.Linear(6, 2)), capsys)["0.dt.weight"][0] == "Muon"
    assert found["0.weight"] == ("AdamW", "a grouped convolution")
    assert found["1.weight"] == ("Lion", "a convolution")
