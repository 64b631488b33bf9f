"""docs/other_libraries.md: its code runs, and does what its words say."""

import re
from pathlib import Path

import pytest
import torch

import maskmoe_kernels as mk

PAGE = Path(__file__).resolve().parents[2] / "docs" / "other_libraries.md"

if not PAGE.is_file():
    pytest.skip("not a checkout: there are no docs", allow_module_level=True)
for library in ("zuko", "captum", "peft", "accelerate", "safetensors"):
    pytest.importorskip(library, reason=f"{library} is not installed")


@pytest.mark.filterwarnings("ignore")
def test_its_code_does_what_it_says(tmp_path):
    torch.manual_seed(0)
    names = {"path": str(tmp_path / "model.safetensors")}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S):
        exec(block, names)
    net, x, last = (names[name] for name in ("net", "x", "last"))
    assert sum(isinstance(layer, mk.MaskedLinear) for layer in names["flow"].modules()) == 6
    assert names["flow"]().log_prob(torch.randn(4, 3)).isfinite().all()

    zero = net(torch.zeros_like(x))[:, last]
    by_group = names["by_group"][:, [0, 3, 7]]
    torch.testing.assert_close(by_group.sum(1), net(x)[:, last] - zero, rtol=0, atol=1e-5)
    torch.testing.assert_close(names["twin"](x), net(x))
    found = names["contributions"].sum(1)
    torch.testing.assert_close(found, net(x)[:, last] - zero, rtol=0, atol=1e-5)
    assert torch.equal(names["empty"](x), net(x))
