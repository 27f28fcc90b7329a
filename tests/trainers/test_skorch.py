"""skorch: arguments of the optimizer by name, a resumed run, GridSearchCV, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small import Network, assert_close, assert_same, each_optimizer, examples, needs, trainer, weights
from torch import nn

import steprule

pytestmark = [trainer, needs("skorch")]


def net(optimizer: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    import skorch

    plain = {"train_split": None, "iterator_train__shuffle": False, "batch_size": 16, "verbose": 0}
    return skorch.NeuralNetClassifier(
        Network,
        module__dtype=dtype,
        criterion=nn.CrossEntropyLoss,
        optimizer=optimizer,
        **{**plain, "max_epochs": 2, **options},
    )


def test_the_numbers_of_torch() -> None:
    made = [
        net(rule, optimizer__lr=0.01, optimizer__weight_decay=0.1).fit(*examples())
        for rule in (steprule.AdamW, torch.optim.AdamW)
    ]
    assert_close(*map(weights, (x.module_ for x in made)))


@each_optimizer
def test_a_resumed_run(make: Any, tmp_path: Path) -> None:
    straight = net(make, max_epochs=4).fit(*examples())
    files = {"f_params": tmp_path / "model.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    net(make).fit(*examples()).save_params(**files)
    resumed = net(make).initialize()
    resumed.load_params(**files)
    resumed.partial_fit(*examples())
    assert_same(weights(resumed.module_), weights(straight.module_))


def test_a_search_over_hyper_parameters() -> None:
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(net(steprule.Lion), {"optimizer__lr": [1e-4, 1e-2]}, cv=2, scoring="accuracy")
    search.fit(*(x.numpy() for x in examples()))
    assert search.best_params_ == {"optimizer__lr": 1e-2}


def test_parameters_in_bfloat16() -> None:
    made = [
        net(rule, torch.bfloat16, optimizer__lr=0.01).fit(*examples(torch.bfloat16))
        for rule in (steprule.AdamW, torch.optim.AdamW)
    ]
    for x, y in zip(*map(weights, (x.module_ for x in made)), strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x, y, rtol=0.02, atol=2e-3)


def test_groups_by_patterns() -> None:
    options = [("layers.0*", {"lr": 0.0}), ("layers.2*", {"lr": 0.1})]
    made = net(steprule.AdamW, optimizer__param_groups=options).fit(*examples())
    first, last = Network().parameters()
    assert torch.allclose(made.module_.layers[0].weight, first)
    assert not torch.allclose(made.module_.layers[2].weight, last, rtol=0.1)
