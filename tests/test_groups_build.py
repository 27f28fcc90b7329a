"""`groups.build`: the groups that people write by hand, made from a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPT, DeclaredVisionTransformer, Mixture, ResNet, VisionTransformer, adapted
from rules import RULES, assert_same, matrices_only, numbers
from torch import nn

import steprule
from steprule import AdamW, Lion, Muon

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "vit": VisionTransformer,
    "declared vit": DeclaredVisionTransformer,
    "gpt": GPT,
    "mixture": Mixture,
    "adapted": adapted,
}
each_model = pytest.mark.parametrize("model", [make() for make in MODELS.values()], ids=list(MODELS))


def build(model: nn.Module, **options: Any) -> Any:
    return steprule.groups.build(model, **{"verbose": False, **options})


def spared(model: nn.Module, **options: Any) -> list[str]:
    """The names in groups without decay."""
    groups = build(model, weight_decay=0.1, **options)
    assert {group["weight_decay"] for group in groups} <= {0.0, 0.1}
    return sorted(name for group in groups if not group["weight_decay"] for name, _ in group["params"])


# The conventions, as each is usually written


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def of_timm(model: nn.Module) -> list[str]:
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return sorted(n for n, p in trainable(model) if p.ndim <= 1 or n.endswith(".bias") or n in listed)


def of_nanogpt(model: nn.Module) -> list[str]:
    return sorted(n for n, p in trainable(model) if p.dim() < 2)


def of_hugging_face(model: nn.Module) -> list[str]:
    def decaying(module: nn.Module) -> list[str]:
        inner = [
            f"{name}.{x}"
            for name, child in module.named_children()
            if not isinstance(child, nn.LayerNorm)
            for x in decaying(child)
        ]
        return inner + list(module._parameters)

    decay = [name for name in decaying(model) if "bias" not in name]
    return sorted(n for n, _ in trainable(model) if n not in decay)


@each_model
def test_vectors_are_what_timm_spares(model: nn.Module) -> None:
    assert spared(model, no_decay="vectors") == of_timm(model)


@each_model
def test_vectors_are_what_nanogpt_and_torchtitan_spare(model: nn.Module) -> None:
    # Their models name nothing themselves.
    named = ["cls_token", "pos_embed"] if isinstance(model, DeclaredVisionTransformer) else []
    assert spared(model, no_decay="vectors") == sorted([*of_nanogpt(model), *named])


@each_model
def test_vectors_are_what_hugging_face_spares_but_for_other_norms_and_vectors(model: nn.Module) -> None:
    own = spared(model, no_decay="vectors")
    theirs = of_hugging_face(model)
    assert set(theirs) <= set(own)
    named = {"cls_token", "pos_embed"} if isinstance(model, DeclaredVisionTransformer) else set[str]()
    modules = dict(model.named_modules())
    for name in set(own) - set(theirs) - named:
        module = modules[name.rpartition(".")[0]]
        assert isinstance(module, nn.BatchNorm2d) or name.endswith(".ls1")
    if isinstance(model, (GPT, Mixture)):
        assert theirs == own


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("resnet", []),
        ("vit", ["cls_token", "pos_embed"]),
        ("declared vit", ["cls_token", "pos_embed"]),
        ("gpt", ["transformer.wpe.weight", "transformer.wte.weight"]),
        ("mixture", ["embed.weight"]),
        ("adapted", []),
    ],
)
def test_auto_spares_embeddings_and_tables_besides(name: str, more: list[str]) -> None:
    model = MODELS[name]()
    assert spared(model) == sorted([*of_nanogpt(model), *more])
    if name == "gpt":
        # The way back to nanoGPT's choice, by name.
        assert spared(model, no_decay={"*.wte.*": False, "*.wpe.*": False}) == of_nanogpt(model)
        # A tied weight has two names.
        assert "transformer.wte.weight" not in spared(model, no_decay={"lm_head.weight": False})


def test_auto_without_declarations_is_timms_choice_with_them() -> None:
    declared = DeclaredVisionTransformer()
    assert spared(VisionTransformer()) == spared(declared) == of_timm(declared)


def test_norms_and_raw_parameters_are_known_by_module_and_shape() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.mix = nn.Parameter(torch.ones(2, 3))
            self.bias = nn.Parameter(torch.ones(2, 3))
            self.A_log = nn.Parameter(torch.ones(2, 3))
            self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
            self.table = nn.Parameter(torch.ones(9, 2))

        def no_weight_decay_keywords(self) -> set[str]:
            return {"tab"}

    norms = [
        nn.LayerNorm((2, 3)),
        nn.GroupNorm(1, 2),
        nn.RMSNorm((2, 3)),
        nn.BatchNorm1d(3),
        nn.InstanceNorm1d(3),
    ]
    others = [
        nn.EmbeddingBag(3, 2),
        nn.PReLU(),
        nn.Bilinear(2, 2, 2),
        nn.LSTM(2, 2),
        nn.ConvTranspose1d(2, 2, 2),
    ]
    model = nn.ModuleDict({"norms": nn.ModuleList(norms), "others": nn.ModuleList(others), "raw": Raw()})
    decaying = {
        "others.2.weight",
        "others.3.weight_ih_l0",
        "others.3.weight_hh_l0",
        "others.4.weight",
        "raw.mix",
    }
    names = {name for name, _ in model.named_parameters()}
    assert set(spared(model)) == names - decaying
    reasons = {entry["name"]: entry["reason"] for entry in build(model).table}
    assert reasons["raw.scale"] == "scale of Raw, a vector"
    assert reasons["raw.mix"] == "mix of Raw, not known"
    assert reasons["raw.A_log"] == "_no_weight_decay"
    assert reasons["raw.table"] == "no_weight_decay of Raw"
    assert reasons["norms.0.weight"] == "of a normalization"


# What the groups are


def test_an_optimizer_of_torch_and_one_of_ours_take_the_same_groups() -> None:
    first = VisionTransformer()
    second = copy.deepcopy(first)
    options: dict[str, Any] = {"weight_decay": 0.1, "lr": 0.01, "layer_decay": 0.5, "lr_mult": {"head.*": 10}}
    optimizers = [
        torch.optim.AdamW(build(first, **options), foreach=False),
        AdamW(build(second, **options), foreach=False),
    ]
    for optimizer, model in zip(optimizers, (first, second), strict=True):
        for step in range(3):
            for place, param in enumerate(model.parameters()):
                param.grad = numbers(tuple(param.shape), param.dtype, seed=100 * step + place)
            optimizer.step()
        assert steprule.audit(model, optimizer).ok
    assert_same(list(first.parameters()), list(second.parameters()))
    of_head = next(x for x in optimizers[1].param_groups if "head.weight" in x["param_names"])
    assert (of_head["name"], of_head["lr"]) == ("layer_4_lr_x10_decay", 0.1)


# LBFGS takes one group; the other rules that are left out take no vectors.
@pytest.mark.parametrize(
    "name", [x for x in steprule.catalogue() if x != "LBFGS" and not matrices_only(RULES[x])]
)
def test_every_rule_takes_them(name: str) -> None:
    model = GPT()
    optimizer = steprule.create(name, build(model, lr=0.1, lr_mult={"*.h.1.*": 0.5}))
    assert steprule.audit(model, optimizer).ok
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.05}


def test_what_is_not_said_is_left_to_the_optimizer() -> None:
    groups = build(GPT())
    assert [(x["name"], x.get("lr"), x.get("weight_decay")) for x in groups] == [
        ("no_decay", None, 0.0),
        ("decay", None, None),
    ]
    optimizer = AdamW(groups, lr=0.5, weight_decay=0.25)
    assert [(x["lr"], x["weight_decay"]) for x in optimizer.param_groups] == [(0.5, 0.0), (0.5, 0.25)]
    # A kind of decay goes for the groups that decay.
    cautious = AdamW(build(GPT()), weight_decay=steprule.WeightDecay(0.1, mode="cautious"))
    assert [x["weight_decay"] for x in cautious.param_groups] == [0.0, 0.1]


def test_lists_and_dicts_of_patterns() -> None:
    model = Mixture()
    assert spared(model, no_decay=["*.bias", "norm.*"]) == sorted(
        name for name, _ in model.named_parameters() if name.endswith("bias") or name.startswith("norm.")
    )
    assert spared(model, no_decay=[]) == []
    # The first pattern that matches decides.
    given = {"layers.0.norm.bias": True, "layers.0.*": False, "head.*": True}
    found = spared(model, no_decay=given)
    assert [name for name in found if name.startswith("layers.0.")] == ["layers.0.norm.bias"]
    assert "head.weight" in found
    assert "layers.1.norm.bias" in found


def test_rules_of_their_own() -> None:
    rule = {"*.c_attn.weight": (Muon, {"lr": 0.02}), "*.mlp.*": (Lion, {"betas": (0.9, 0.95)})}
    groups = build(GPT(), weight_decay=0.1, lr=1e-3, rule=rule, lr_mult={"*.h.1.*": 0.5})
    optimizer = AdamW(groups)
    found = {x["name"]: (x.get("rule"), x["lr"], x["weight_decay"]) for x in optimizer.param_groups}
    assert found == {
        "no_decay": (None, 1e-3, 0.0),
        "decay": (None, 1e-3, 0.1),
        "muon_decay": ("Muon", 0.02, 0.1),
        "lion_decay": ("Lion", 1e-3, 0.1),
        "lion_no_decay": ("Lion", 1e-3, 0.0),
        "lr_x0.5_no_decay": (None, 5e-4, 0.0),
        "lr_x0.5_decay": (None, 5e-4, 0.1),
        "muon_lr_x0.5_decay": ("Muon", 0.01, 0.1),
        "lion_lr_x0.5_decay": ("Lion", 5e-4, 0.1),
        "lion_lr_x0.5_no_decay": ("Lion", 5e-4, 0.0),
    }
    two = build(GPT(), rule={"*.fc1.weight": (Muon, {"lr": 1}), "*.fc2.weight": (Muon, {"weight_decay": 0.5})})
    assert [(x["name"], x.get("weight_decay")) for x in two if "rule" in x] == [
        ("muon_decay", None),
        ("muon_decay:2", 0.5),
    ]


def test_frozen_parameters() -> None:
    model = adapted()
    kept = {name for name, _ in model.named_parameters() if ".lora_" in name}
    groups = build(model)
    assert {name for group in groups for name, _ in group["params"]} == kept
    frozen = [x for x in groups.table if x["group"] is None]
    assert {x["name"] for x in frozen} == {name for name, _ in model.named_parameters()} - kept
    assert all(x["reason"].startswith("frozen") for x in frozen)
    everything = build(model, frozen="keep")
    assert sum(len(group["params"]) for group in everything) == len(list(model.parameters()))
    assert len(steprule.audit(model, AdamW(everything)).frozen) == len(frozen)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    groups = build(GPT(), weight_decay=0.1, lr=1e-3, layer_decay=0.5, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == str(groups).splitlines()
    assert lines[0].split() == ["parameter", "shape", "group", "lr", "decay", "reason"]
    why = "an embedding, shared with another layer; layer 0 of 3"
    assert " ".join(lines[1].split()) == f"transformer.wte.weight (11, 8) layer_0_no_decay 0.000125 0 {why}"
    assert len(lines) == 1 + len(list(GPT().parameters()))
    build(GPT())
    assert not capsys.readouterr().out
    assert json.loads(json.dumps(groups.table)) == groups.table
    assert groups.table[0] == {
        "name": "transformer.wte.weight",
        "shape": [11, 8],
        "group": "layer_0_no_decay",
        "rule": None,
        "lr": 0.000125,
        "weight_decay": 0.0,
        "reason": "an embedding, shared with another layer; layer 0 of 3",
    }


def test_a_lazy_model_before_it_has_shapes() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    for no_decay in ("auto", "vectors"):
        assert spared(model, no_decay=no_decay) == ["0.bias", "1.bias", "1.weight", "3.bias"]
    assert "no shape yet" in str(build(model))
    assert json.loads(json.dumps(build(model).table)) == build(model).table


PARTS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 3),
    lambda: nn.Embedding(3, 3),
    lambda: nn.LayerNorm(3),
    lambda: nn.Conv2d(3, 3, 1, groups=3),
    lambda: nn.MultiheadAttention(4, 2),
    GPT,
    Mixture,
    ResNet,
]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    st.data(),
    st.sampled_from(["auto", "vectors"]),
    st.sampled_from([None, 0.0, 0.1]),
    st.sampled_from(["skip", "keep"]),
)
def test_every_parameter_is_in_one_group_with_what_the_table_says(
    parts: Any, data: Any, no_decay: Any, weight_decay: Any, frozen: Any
) -> None:
    model = nn.Sequential(*(part() for part in parts))
    named = list(model.named_parameters())
    names = st.sampled_from([name for name, _ in named])
    for name in data.draw(st.lists(names, unique=True, max_size=len(named) - 1)):
        model.get_parameter(name).requires_grad_(False)
    chosen = data.draw(st.lists(names, unique=True, max_size=3))
    factors = dict(zip(chosen, (0.5, 2.0, 0.5), strict=False))
    options = {"no_decay": no_decay, "weight_decay": weight_decay, "frozen": frozen}
    groups = build(model, lr=0.1, lr_mult=factors, **options)
    optimizer = AdamW(groups)
    report = steprule.audit(model, optimizer)
    assert report.ok or (frozen == "keep" and not report.missing and not report.foreign)
    assert [x["name"] for x in groups.table] == [name for name, _ in named]
    assert len({x["name"] for x in groups}) == len(groups)
    where = {id(p): group for group in groups for _, p in group["params"]}
    for (name, param), entry in zip(named, groups.table, strict=True):
        group = where.get(id(param), {})
        assert group.get("name") == entry["group"]
        assert bool(group) is (param.requires_grad or frozen == "keep")
        if group:
            assert group["lr"] == entry["lr"] == 0.1 * factors.get(name, 1)
            assert group.get("weight_decay") == entry["weight_decay"]
    assert json.loads(json.dumps(groups.table)) == groups.table


# Layers


def layers(model: nn.Module) -> dict[str, int]:
    """The layers, read from the learning rates."""
    groups = build(model, lr=1.0, layer_decay=0.5, frozen="keep")
    powers = {name: -round(torch.tensor(x["lr"]).log2().item()) for x in groups for name, _ in x["params"]}
    last = max(powers.values())
    assert all(x["lr"] == 0.5 ** powers[x["params"][0][0]] for x in groups)
    return {name: last - power for name, power in powers.items()}


def of_beit(name: str, depth: int) -> int:
    """The layer of a parameter of a vision transformer."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


def test_layers_of_a_vision_transformer_are_those_of_beit() -> None:
    names = [name for name, _ in VisionTransformer(5).named_parameters()]
    assert layers(VisionTransformer(5)) == {name: of_beit(name, 5) for name in names}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_group_matcher_decides(wrapped: bool) -> None:
    model: nn.Module = DeclaredVisionTransformer(5)
    names = [name for name, _ in model.named_parameters()]
    # As in timm: the last norm goes with the last block.
    wanted = {name: 5 if name.startswith("norm") else of_beit(name, 5) for name in names}
    prefix = "module." if wrapped else ""
    assert layers(nn.DataParallel(model) if wrapped else model) == {prefix + x: y for x, y in wanted.items()}


def test_a_group_matcher_may_be_a_function() -> None:
    model = VisionTransformer(2)
    place = {"blocks": 1, "norm": None, "head": None}
    model.group_matcher = lambda coarse: lambda name: place.get(name.partition(".")[0], (0,))  # type: ignore[assignment]
    expected = {name: 0 for name, _ in model.named_parameters()}
    expected |= {x: 1 for x in expected if x.startswith("blocks")}
    expected |= {x: 2 for x in expected if x.startswith(("norm", "head"))}
    assert layers(model) == expected


def test_layers_of_other_models() -> None:
    found = layers(ResNet((2, 3)))
    assert [found[x] for x in ("conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.1.bn2.bias")] == [
        0,
        0,
        1,
        2,
    ]
    assert [found[x] for x in ("layer2.0.downsample.1.weight", "layer2.2.conv2.weight", "fc.bias")] == [3, 5, 6]
    found = layers(GPT(4))
    assert found["transformer.wte.weight"] == found["transformer.wpe.weight"] == 0
    assert [found[f"transformer.h.{i}.mlp.fc1.bias"] for i in range(4)] == [1, 2, 3, 4]
    assert found["transformer.ln_f.weight"] == 5
    # Experts work side by side.
    found = layers(Mixture(3, count=7))
    assert {found[f"layers.1.moe.experts.{i}.fc1.weight"] for i in range(7)} == {2}
    assert (found["embed.weight"], found["layers.2.moe.gate.weight"], found["head.weight"]) == (0, 3, 4)


class Stage(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8) for _ in range(count)])
        self.downsample = nn.Linear(4, 4)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 2)


class Headed(nn.Module):
    """A block whose heads are a list of their own, longer than the list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(5)])
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)


def test_the_blocks_are_those_of_the_longest_list_that_holds_most_weights() -> None:
    stages = nn.Sequential(nn.Conv2d(3, 4, 4), nn.ModuleList([Stage(1), Stage(3)]), nn.Linear(4, 2))
    found = layers(stages)
    assert [found[f"1.1.blocks.{i}.linear1.weight"] for i in range(3)] == [2, 3, 4]
    assert (found["1.0.downsample.weight"], found["2.weight"]) == (1, 5)
    found = layers(nn.Sequential(nn.Embedding(5, 8), *(Headed() for _ in range(3)), nn.Linear(8, 5)))
    assert (found["0.weight"], found["1.heads.4.query.weight"], found["3.up.bias"], found["4.bias"]) == (
        0,
        1,
        3,
        4,
    )
    # A Sequential is no block if there are others.
    found = layers(
        nn.Sequential(*(nn.Sequential(*(Headed() for _ in range(i))) for i in (2, 1, 2)), nn.Linear(8, 5))
    )
    assert (found["0.0.up.bias"], found["1.0.up.bias"], found["2.1.up.bias"], found["3.bias"]) == (0, 2, 4, 5)
    assert set(layers(nn.Sequential(*(nn.Sequential(nn.Conv1d(2, 2, 1)) for _ in range(3)))).values()) == {
        0,
        1,
        2,
    }


def test_an_encoder_and_a_decoder_follow_one_another() -> None:
    found = layers(nn.Transformer(8, 2, 3, 2, 16, batch_first=True))
    assert [found[f"encoder.layers.{i}.linear1.weight"] for i in range(3)] == [0, 1, 2]
    assert [found[f"decoder.layers.{i}.linear1.weight"] for i in range(2)] == [3, 4]
    assert (found["encoder.norm.weight"], found["decoder.norm.bias"]) == (2, 5)


def test_embeddings_and_the_output_layer_have_their_layers_wherever_they_stand() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.stem = nn.Conv2d(3, 4, 1)
            self.blocks = ResNet().layer2
            self.places = nn.Embedding(3, 4)

    found = layers(Late())
    assert (found["stem.weight"], found["places.weight"], found["head.weight"]) == (0, 0, 4)


def test_twelve_layers_and_twelve_classes_are_no_experts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8) for _ in range(12)])
            self.head = nn.Linear(4, 12)

    for model in (Model(), nn.DataParallel(Model())):
        assert sorted(set(layers(model).values())) == list(range(13))


# Errors

VIT = VisionTransformer()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"no_decay": "*.bias"},
            r"no_decay = '\*\.bias', must be 'auto', 'vectors', a list of patterns, or a dict",
        ),
        ({"no_decay": None}, "no_decay = None, must be 'auto'"),
        (
            {"no_decay": ["*.bais"]},
            r"groups\.build, no_decay: no parameter matches '\*\.bais'\. Did you mean '\*\.bias'",
        ),
        ({"no_decay": ["block.*.norm1.bias"]}, r"Did you mean 'blocks\.\*\.norm1\.bias'"),
        ({"no_decay": {"norm.*": 0.5}}, r"no_decay\['norm\.\*'\] = 0\.5, must be True or False"),
        (
            {"no_decay": ["*.bias", "norm.bias"]},
            r"'norm\.bias' decides nothing, because '\*\.bias' comes first",
        ),
        (
            {"lr_mult": {"heed.*": 2.0}, "lr": 1.0},
            r"lr_mult: no parameter matches 'heed\.\*'\. Did you mean 'head\.\*'",
        ),
        ({"lr_mult": {"head.*": -1}, "lr": 1.0}, r"lr_mult\['head\.\*'\] = -1, must be at least 0"),
        ({"lr_mult": {"head.*": 2.0}}, "lr_mult and layer_decay need the lr"),
        ({"layer_decay": 0.5}, "lr_mult and layer_decay need the lr"),
        ({"layer_decay": 0.0, "lr": 1.0}, "layer_decay = 0.0, must be above 0 and at most 1"),
        ({"layer_decay": 65, "lr": 1.0}, "layer_decay = 65, must be above 0 and at most 1"),
        ({"weight_decay": -0.1}, r"weight_decay = -0\.1, must be at least 0"),
        ({"lr": float("nan")}, "lr = nan, must be at least 0"),
        ({"frozen": "drop"}, "frozen = 'drop', must be 'skip' or 'keep'"),
        ({"rule": {"nothing": (Muon, {})}}, "rule: no parameter matches 'nothing'"),
        ({"rule": {"*": (Muon, {"params": 1})}}, r"rule\['\*'\] has 'params', which groups\.build decides"),
    ],
)
def test_what_build_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(VIT, **options)


def test_what_has_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"groups\.build: got list, must be an nn\.Module"):
        build(list(VIT.parameters()))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"rule\['\*'\] = .*, must be a rule and a dict of its hyper-parameters"
    ):
        build(VIT, rule={"*": Muon})
    with pytest.raises(TypeError, match=r"weight_decay = '0\.1', must be a number"):
        build(VIT, weight_decay="0.1")
    with pytest.raises(
        ValueError, match=r"layer_decay needs a ModuleList or Sequential of blocks .* and Linear has none"
    ):
        build(nn.Linear(2, 2), lr=1.0, layer_decay=0.5)
    with pytest.raises(ValueError, match="is everything frozen"):
        AdamW(build(nn.Linear(2, 2).requires_grad_(False)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("way", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_the_lengths_of_a_weight_norm_do_not_decay(way: Any) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), way(nn.Linear(4, 4)), way(nn.Linear(4, 9)))
    decay = {entry["name"]: entry["weight_decay"] for entry in build(model, weight_decay=0.1).table}
    directions = [name for name in decay if name.endswith(("weight_v", "original1"))]
    assert len(directions) == 2
    assert decay == {name: 0.1 if name in directions else 0.0 for name in decay}


def test_what_no_weight_decay_may_return() -> None:
    model = nn.Linear(2, 2)
    for names, wanted in (("weight", 0.0), (["weight"], 0.0), ((), 0.1), (None, 0.1)):
        model.no_weight_decay = lambda names=names: names  # type: ignore[assignment]
        assert build(model, weight_decay=0.1).table[0]["weight_decay"] == wanted
    model.no_weight_decay = lambda: 3  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"Linear\.no_weight_decay\(\) returned 3, must return names"):
        build(model)
