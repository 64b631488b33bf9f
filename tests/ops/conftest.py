import pytest
import torch

from maskmoe_kernels.ops import native


@pytest.fixture(autouse=True)
def _threads_and_isa_stay():
    """What tests and runners choose for the whole process: the next test starts afresh."""
    threads, isa = torch.get_num_threads(), native.isa()
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        native.set_isa(isa)


@pytest.fixture
def default_device():
    """The host emulator with the settings of the GPU it stands for; the next test starts afresh."""
    from tests.ops.host_emulator import configure  # which compiles the emulator

    configure()
    yield
    configure()
