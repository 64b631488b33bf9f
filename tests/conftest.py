"""What every test shares: hypothesis profiles, the device, the data folder."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():  # read when the kernels are imported, which is on first use
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("dev", max_examples=60, deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("dev"), max_examples=100, derandomize=True)
settings.register_profile(
    "deep",
    settings.get_profile("dev"),
    max_examples=2000,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(  # a mutant is to die soon, and needs no smallest example
    "mutants",
    settings.get_profile("dev"),
    max_examples=15,
    derandomize=True,
    print_blob=False,
    phases=[Phase.explicit, Phase.generate],
)
settings.register_profile(  # on a GPU for minutes: few examples, and a failure is told at once
    "lab", settings.get_profile("mutants"), max_examples=12
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests run: cpu, cuda or cuda:N")


def pytest_configure(config: pytest.Config) -> None:
    if torch.device(config.getoption("--device")).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this torch sees no GPU; leave the option out")
    os.environ["MASKMOE_TEST_DEVICE"] = config.getoption("--device")  # for tests.ops.runners
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores already


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["cuda"] = "needs an NVIDIA GPU"
    if os.environ.get("HYPOTHESIS_PROFILE") != "deep":
        reasons["deep"] = "takes long: make deep"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    # A million objects of torch and of the tests live to the end: collections pass them over.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else the end of the process would find them leaked


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device under test, ``--device``."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no data sets in ../shared/data beside the checkout")
    return path


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
