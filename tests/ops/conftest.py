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
def usual_machine():
    """The host twin runs on the machine that it stands for; the next test starts afresh."""
    from tests.ops.cuda_twin import configure  # which compiles the twin

    configure()
    yield
    configure()
