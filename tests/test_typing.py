"""What a type checker sees of the constructors: every name, type and default, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import steprule

SCRIPT = """
import torch, steprule

p = [torch.nn.Parameter(torch.zeros(3))]
steprule.Adam(p, 1e-3, (0.9, 0.99), amsgrad=True, foreach=False, state_dtype="int8")
steprule.AdaBelief(p, lr=1e-3, rectify=False, weight_decay=steprule.WeightDecay(0.1))
steprule.RMSprop(p, 0.1, 0.99).step()
steprule.LBFGS(p, lr=1.0, line_search_fn="strong_wolfe")
steprule.Adam(p, weigth_decay=1)
steprule.Adam(p, lr="large")
steprule.Adam(p, state_dtype="int4")
steprule.Adam(p, state_dtype={"exp_avg": "int4"})
steprule.Adam(p, low_precision="kahn")
steprule.Adam(p, nonfinite="skp")
steprule.LBFGS(p, line_search_fn="wolfe")
steprule.Muon(p, adjust_lr_fn="rms")
steprule.Adam(p).load_state_dict({}, hyperparams="save")
steprule.Adam(p, state_dtype=torch.bfloat16, low_precision="kahan", nonfinite="skip")
steprule.Adam(p, state_dtype={"exp_avg": "int8", "exp_avg_sq": torch.bfloat16})
steprule.Muon(p, adjust_lr_fn="match_rms_adamw")
steprule.Adam(p).load_state_dict({}, hyperparams={"lr": "current"})
"""


def test_a_type_checker_sees_names_types_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    source = str(Path(steprule.__file__).parents[1])
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [source]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "script.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [x for x in json.loads(found.stdout)["generalDiagnostics"] if x["severity"] == "error"]
    assert [x["range"]["start"]["line"] + 1 for x in errors] == list(range(9, 18)), errors
    assert "weigth_decay" in errors[0]["message"]
    assert "lr" in errors[1]["message"]
    arguments = ["state_dtype", "state_dtype", "low_precision", "nonfinite", "line_search_fn", "adjust_lr_fn"]
    for error, name in zip(errors[2:], [*arguments, "hyperparams"], strict=True):
        assert name in error["message"]
